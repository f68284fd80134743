"""The checks of `tests.bench.gpu_check` that need no DeepSpeed: a GPU's numbers against a CPU's, and their repetition.

On a machine without a GPU what is compared with a CPU is compared with itself, so that the checks' own code is tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from decimal import Decimal
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed import failure_text, pick_device, to_device
from pipeline.evaluation.corruptions.measure import CORRUPTIONS, corrupted
from pipeline.evaluation.measures.randomized_smoothing import Smoothing, certify
from pipeline.models import Network, build_network
from pipeline.models.pruning.allocation import mask_rule
from pipeline.models.pruning.scores import Scores
from pipeline.models.pruning.topk import topk_mask
from pipeline.models.state import train_only
from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.sections import Model
from pipeline.recipe.threat_model import ThreatModel
from pipeline.rng import sample_keys, uniforms
from pipeline.robustness.bounds import interval_bounds, linf_box, trace
from pipeline.robustness.noise import device_keys, gaussian_noise, uniform_noise
from pipeline.robustness.objectives import ObjectiveInput, build_objective
from tests.support.techniques import usual_objective

Check = tuple[str, tuple[str, ...], Callable[[torch.device], str]]
"""(name, what it needs: 'cuda' or packages, function that raises or returns a detail)."""
CPU = torch.device("cpu")
CLOSE = 1e-4
"""Largest relative difference between a GPU's number and a CPU's."""
IDS = np.arange(8)
FAMILIES = {
    "cpu": {"small_cnn": 32, "cnn_small": 32, "vgg2_bn_cifar": 32, "resnet18_w16_cifar": 32, "squeezenet1_1": 64},
    "cuda": {
        **{"small_cnn": 32, "cnn_small": 32, "vgg2_bn_cifar": 32, "wrn_28_4": 32, "resnet18_w16_cifar": 32},
        **{"ra_resnet50": 64, "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64},
        **{"googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64},
        **{"mobilenet_v3_small": 64, "regnet_x_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64},
        **{"shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 64},
        **{"wide_resnet50_2": 64},
    },
}
"""One network of each family -> image size, in pixels."""


def network_of(arch: str, where: torch.device, size: int = 32, classes: int = 10) -> Network:
    """The network of seed 0 in training mode."""
    return build_network(Model(arch=arch, num_classes=classes), 0, size).to(where).train()


def random_images(count: int, size: int, where: torch.device, seed: int = 0) -> Tensor:
    """[n, 3, size, size] float32 in [0, 1], channels last, the same on every device."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last).to(where)


def labels_of(count: int, where: torch.device, classes: int = 10) -> Tensor:
    return torch.arange(count, device=where) % classes


def assert_close(actual: Tensor | float, expected: Tensor | float, what: str, relative: float = CLOSE) -> float:
    """The largest difference, as a share of the largest expected magnitude. Errors: AssertionError naming `what`."""
    one, other = (torch.as_tensor(value).detach().cpu().double() for value in (actual, expected))
    difference = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
    assert difference <= relative, f"{what}: differs by {difference:.2g} of the largest value"
    return difference


def assert_repeats(what: str, function: Callable[[], list[Tensor]], times: int = 2) -> None:
    """Errors: AssertionError unless all results of `function` have the same bits."""
    first = [tensor.clone() for tensor in function()]
    for number in range(1, times):
        for place, (one, other) in enumerate(zip(first, function(), strict=True)):
            assert torch.equal(one, other), f"{what}: result {place} of call {number + 1} differs from the first"


def _driver(where: torch.device) -> str:
    assert pick_device("cuda").type == where.type
    major, minor = torch.cuda.get_device_capability(where)
    built = ", ".join(torch.cuda.get_arch_list())
    return f"sm_{major}{minor}; torch {torch.__version__} is built for CUDA {torch.version.cuda}: {built}"


def _cublas(where: torch.device) -> str:
    one, two = torch.rand(2, 257, 257, device=where)
    assert_repeats("a product of matrices", lambda: [one @ two], 5)
    with torch.autocast(where.type, torch.bfloat16):
        assert_repeats("a product in bf16", lambda: [one @ two], 5)
    return "products under deterministic algorithms neither raise nor differ"


def _page_locked(where: torch.device) -> str:
    """Values that are copied while the GPU is busy are those that were there when the copy was asked for."""
    busy = torch.rand(2048, 2048, device=where)
    for number in range(20):
        for _ in range(5):
            busy = (busy @ busy).clamp(0, 1)
        source = torch.full((1 << 18,), float(number))
        copy = to_device(source, where)
        source.fill_(-1.0)
        del source
        torch.full((1 << 18,), -2.0).pin_memory()  # would take the page-locked block, were it free already
        assert bool((copy == number).all()), f"copy {number} has other values"
    return "20 copies beside a busy stream are whole"


def _keyed_noise(where: torch.device) -> str:
    keys = sample_keys(IDS, 0, "check")
    own = device_keys(IDS, where, 0, "check")
    uniform = uniform_noise(own, (3, 32, 32)).cpu()
    expected = torch.from_numpy(uniforms(keys, 3 * 32 * 32)).view(-1, 3, 32, 32)
    assert float((uniform - expected).abs().max()) <= 2.0**-24, "uniform numbers are not numpy's"
    assert torch.equal(uniform, uniform_noise(own.cpu(), (3, 32, 32))), "uniform numbers differ from the CPU's"
    worst = assert_close(gaussian_noise(own, (3, 32, 32)), gaussian_noise(own.cpu(), (3, 32, 32)), "normal numbers")
    return f"uniform numbers equal, normal ones within {worst:.1g}"


def _max_pool(where: torch.device) -> str:
    """Windows that overlap, and values with many ties, so that an entry has several gradients to add up."""
    for memory in (torch.contiguous_format, torch.channels_last):
        images = torch.randint(4, (16, 64, 56, 56), generator=torch.Generator().manual_seed(0)).float()
        images = images.to(where, memory_format=memory).requires_grad_()  # pyright: ignore[reportCallIssue]
        weight = torch.rand_like(F.max_pool2d(images, 3, 2, 1))

        def backward(images: Tensor = images, weight: Tensor = weight) -> list[Tensor]:
            return list(torch.autograd.grad((F.max_pool2d(images, 3, 2, 1) * weight).sum(), images))

        assert_repeats(f"max_pool2d's backward, {memory}", backward, 20)
    return "20 backwards are equal, in both memory formats"


def _loss_and_gradients(network: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    out = network(images)
    loss = F.cross_entropy(out, labels)
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [loss, *(gradient for gradient in gradients if gradient is not None)]


def _families(where: torch.device) -> str:
    for arch, size in FAMILIES[where.type].items():
        network = network_of(arch, where, size).to(memory_format=torch.channels_last)  # pyright: ignore
        for module in network.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.eval()
        images, labels = random_images(4, size, where), labels_of(4, where)
        assert_repeats(arch, partial(_loss_and_gradients, network, images, labels))
    return f"forward and backward of {len(FAMILIES[where.type])} networks are equal twice"


def _masks(where: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (64, 3, 3, 3), "b": (128, 64, 3, 3), "c": (10, 128)}
    scores = {name: torch.randn(shape, generator=generator).round(decimals=2) for name, shape in shapes.items()}
    for name, score in scores.items():
        for kept in (1, score.numel() // 3, score.numel()):
            assert torch.equal(topk_mask(score.to(where), kept).cpu(), topk_mask(score, kept)), f"{name}, {kept}"
    own = {name: score.to(where) for name, score in scores.items()}
    sources = ("uniform", "erk", "global", "learned", "harp")
    for source in sources:
        rates = {name: torch.tensor([0.1 * n]) for n, name in enumerate(scores) if source in ("learned", "harp")}
        rule = mask_rule({name: score.shape for name, score in scores.items()}, Decimal("0.1"), source)
        masks = rule(own, {name: rate.to(where) for name, rate in rates.items()})
        expected = rule(scores, rates)
        different = sum(int((masks[name].cpu() != expected[name]).sum()) for name in scores)
        # exp of a learned rate may round differently, and then exchange two connections at the threshold.
        assert different <= (2 if source == "learned" else 0), f"{source}: {different} connections differ"
    return f"masks with ties and {len(sources)} allocations are the CPU's"


def _masked_gradients(where: torch.device) -> str:
    """dL/ds = dL/dw w sign(s) for all connections, dL/dw only for kept ones (HYDRA)."""
    for precision, last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        layer = nn.Conv2d(8, 16, 3).to(where)
        layer.weight.data = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)).to(where)
        plain = layer.weight.detach().clone()
        if last:
            layer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        scores = Scores.attach(layer, Decimal("0.3"))
        (mask,), (score,) = scores.masks().values(), scores.parameters().values()
        images = torch.rand(4, 8, 9, 9, generator=torch.Generator().manual_seed(1)).to(where)
        images = images.to(memory_format=torch.channels_last) if last else images
        context = torch.autocast(where.type, precision) if precision != torch.float32 else nullcontext()
        with context:
            loss = layer(images).float().square().sum()
        loss.backward()
        effective = (plain * mask).double().cpu().requires_grad_()
        bias = layer.bias.detach().double().cpu()  # pyright: ignore[reportOptionalMemberAccess]
        F.conv2d(images.double().cpu().contiguous(), effective, bias).square().sum().backward()
        assert effective.grad is not None
        assert score.grad is not None
        relative = 1e-5 if precision == torch.float32 else 0.03
        name = f"{precision}, channels last: {last}"
        original = layer.parametrizations["weight"].original  # pyright: ignore
        expected = effective.grad * plain.double().cpu() * score.sign().cpu()
        assert_close(score.grad, expected, f"{name}, scores", relative)
        assert_close(original.grad, effective.grad * mask.cpu(), f"{name}, weights", relative)
    return "those of scores and weights are HYDRA's, in fp32 and bf16, in both memory formats"


def objective_loss(name: str, where: torch.device) -> float:
    l2 = name in ("noise", "stability", "smoothadv")
    threat_model = ThreatModel(norm="l2", eps="1/4") if l2 else ThreatModel(norm="linf", eps="1/20")  # pyright: ignore
    objective = build_objective(usual_objective(name), threat_model, "prune")
    network, images = network_of("cnn_small", where), random_images(8, 32, where)
    keys, noise = device_keys(IDS, where, 0, "check"), torch.zeros_like(images)
    batch = ObjectiveInput(network, network, images, labels_of(8, where), keys, elapsed=0.9, noise=noise)
    loss = objective(batch).loss
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients), f"{name}: a gradient is not finite"
    return loss.item()


def _objectives(where: torch.device) -> str:
    worst = max(assert_close(objective_loss(name, where), objective_loss(name, CPU), name) for name in TECHNIQUES)
    return f"the losses of {len(TECHNIQUES)} objectives are the CPU's within {worst:.1g}"


def _bounds(where: torch.device) -> str:
    margins = []
    for place in (where, CPU):
        network, labels = network_of("cnn_small", place).eval(), labels_of(8, place)
        with torch.no_grad():
            bounds = interval_bounds(trace(network), linf_box(random_images(8, 32, place), 1 / 255))
            margins.append(torch.cat([bounds.interval_margins(labels), bounds.linear_margins(labels)]))
    worst = assert_close(margins[0], margins[1], "margins", 1e-3)
    smoothing = Smoothing(0.25, 20, 400, 0.01, 100)
    for image, key in zip(random_images(2, 32, CPU), device_keys(IDS[:2], CPU, 0, "check"), strict=True):
        votes = [
            certify(network_of("cnn_small", place), image.to(place), key.to(place), smoothing).votes
            for place in (where, CPU)
        ]
        assert abs(votes[0] - votes[1]) <= 4, f"votes of 400: {votes}"
    return f"margins are the CPU's within {worst:.1g}, votes of certificates within 4 of 400"


def _corruptions(where: torch.device) -> str:
    """In 8 bits, so that a rounding error shows as a step of 1/255 in few pixels, and no more."""
    images = (random_images(4, 32, CPU) * 255).round() / 255
    shares = {}
    for name in CORRUPTIONS:
        own = corrupted(images.to(where), IDS[:4], 0, name, 3).cpu()
        shares[name] = float((own != corrupted(images, IDS[:4], 0, name, 3)).float().mean())
    worst = max(shares, key=shares.__getitem__)
    assert shares[worst] <= 0.01, f"{worst}: {shares[worst]:.2%} of the values differ"
    return f"{len(shares)} corruptions; at most {shares[worst]:.2%} of the values differ from the CPU's ({worst})"


def _autoattack(where: torch.device) -> str:
    from pipeline.evaluation.measures.autoattack import Ensemble

    threat_model = ThreatModel.model_validate({"norm": "linf", "eps": "1/1000"})
    ensemble = Ensemble("autoattack", threat_model, 10, 0, iterations=3, queries=20)
    network = network_of("small_cnn", where).eval()
    images = random_images(8, 32, where)
    labels = network(images).argmax(dim=1)  # so that there is something to break

    def verdicts() -> list[Tensor]:
        return list(ensemble.verdicts(network, images, labels, IDS).values())

    assert_repeats("verdicts", verdicts)
    return "the verdicts of two calls are equal"


def _probes(where: torch.device) -> str:
    from pipeline.evaluation.measures.pgd import Pgd
    from pipeline.evaluation.measures.randomized_smoothing import Noisy

    threat_model = ThreatModel.model_validate({"norm": "linf", "eps": "1/50"})
    network, images = network_of("small_cnn", where).eval(), random_images(8, 32, where)
    labels = network(images).argmax(dim=1)
    for measure in (Pgd(threat_model, 5, 0.005, 2, 0), Noisy(0.25, 5, 0)):
        assert_repeats(measure.name, lambda m=measure: list(m.verdicts(network, images, labels, IDS).values()))
    examples = [list(Pgd(threat_model, 5, 0.005, 1, 0).examples(network, images, labels, IDS)) for _ in range(2)]
    assert torch.equal(examples[0][0], examples[1][0]), "adversarial examples of two calls differ"
    return "PGD and the vote over noise are equal twice"


def _compiled(where: torch.device) -> str:
    from pipeline.training.compiled import Compiled

    network, images = network_of("small_cnn", where), random_images(16, 32, where)
    scores = Scores.attach(network, Decimal("0.1"))
    train_only(network, "scores")
    compiled, gradients = Compiled(network), []
    try:
        for forward in (network, compiled):
            loss = F.cross_entropy(forward(images), labels_of(16, where))
            gradients.append(torch.autograd.grad(loss, list(scores.parameters().values())))
    finally:
        compiled.close()
    worst = max(assert_close(one, other, "a gradient", 1e-3) for one, other in zip(*gradients, strict=True))
    return f"gradients of scores are the eager ones within {worst:.1g}"


def _out_of_memory(where: torch.device) -> str:
    texts = []
    for share in (2, 3):
        try:
            torch.empty(share * torch.cuda.get_device_properties(where).total_memory, dtype=torch.uint8, device=where)
        except torch.OutOfMemoryError as error:
            texts.append(failure_text(error))
    assert len(texts) == 2, texts
    assert texts[0] == texts[1]
    assert math.isfinite(objective_loss("pgd", where))
    return "is recorded with one text, and the step after it is normal"


CHECKS: list[Check] = [
    ("driver and architectures", ("cuda",), _driver),
    ("cuBLAS's workspace", ("cuda",), _cublas),
    ("page-locked copies", ("cuda",), _page_locked),
    ("keyed noise", (), _keyed_noise),
    ("max_pool2d's backward", (), _max_pool),
    ("one network of each family", (), _families),
    ("masks", (), _masks),
    ("gradients of masked weights", (), _masked_gradients),
    ("objectives", (), _objectives),
    ("bounds and certificates", (), _bounds),
    ("corruptions", (), _corruptions),
    ("PGD and noise", (), _probes),
    ("AutoAttack", ("pyautoattack",), _autoattack),
    ("compiled network", ("cuda",), _compiled),
    ("out of memory", ("cuda",), _out_of_memory),
]
