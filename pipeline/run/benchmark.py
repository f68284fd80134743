"""What `launch benchmark` has measured, as benchmark.json holds it: sizes, costs and speeds of networks on one machine.

No torch: reports and model cards read it. An entry belongs to an exported network by `model_sha256`; those of another
network, such as one that was trained again, are to be ignored.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.run.records import Count, Record

Runtime = Literal["torch", "onnxruntime", "openvino"]
RUNTIME_TITLES: dict[Runtime, str] = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
Positive = Annotated[float, Field(gt=0)]


class Spread(Record):
    """Of one number per round: median, smallest and largest."""

    median: Positive
    low: Positive
    high: Positive


class Speed(Record):
    """How long one batch takes: CPU time on one thread, wall-clock time on several."""

    batch: Annotated[int, Field(gt=0)]
    """Images."""
    threads: Annotated[int, Field(gt=0)]
    rounds: Annotated[int, Field(gt=0)]
    seconds: Spread
    """Per batch."""
    times_as_fast: Spread
    """The reference's seconds / this entry's, round by round: other load on the machine affects both alike."""

    @property
    def milliseconds(self) -> float:
        """Per batch, median."""
        return 1e3 * self.seconds.median

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds.median


class BenchmarkEntry(Record):
    """One file in one runtime."""

    network: str
    """For tables: "dense", "HYDRA, 99 % pruned", or the path that was given."""
    method: str | None = None
    """Title of the method of a run's network, "dense" without one; absent for a file outside a run."""
    keep_fraction: str | None = None
    """As the recipe spells it; "1" is dense. Absent if unknown."""
    model_sha256: str | None = None
    """Of the model.safetensors that the file was made from; absent for ONNX files and programs that were given."""
    file: str
    """Name of the file: model.safetensors, model.onnx, model-int8.onnx, or the one that was given."""
    sha256: str
    """Of the file. int8 files that a benchmark makes have ranges of random images, on which neither size nor time
    depend, and so differ from exported ones."""
    runtime: Runtime
    precision: str
    """In which it computes: float32, bfloat16, or int8 with what the other layers have ("int8, float32")."""
    size: Count
    """Bytes of the file."""
    compressed: Count
    """Bytes of the file after gzip."""
    times_smaller: Positive
    """Bytes of the reference's file, not compressed / `compressed`."""
    parameters: Count
    """Weights of convolutions and linear layers."""
    kept_parameters: Count
    """Those that are not zero."""
    multiply_accumulates: Count
    """Of convolutions and linear layers, for one image: what a dense runtime computes."""
    kept_multiply_accumulates: Count
    """Those with a weight that is not zero."""
    speeds: tuple[Speed, ...]

    def speed(self, batch: int, threads: int) -> Speed | None:
        return next((speed for speed in self.speeds if (speed.batch, speed.threads) == (batch, threads)), None)

    @property
    def title(self) -> str:
        """Of runtime and precision: ONNX Runtime, float32."""
        return f"{RUNTIME_TITLES[self.runtime]}, {self.precision}"


class Benchmark(Record):
    """benchmark.json: everything was measured in one process, alternately."""

    FIX: ClassVar[str] = "measure again, or delete it"

    created: str
    """ISO 8601, with the time zone."""
    processor: str
    cores: Annotated[int, Field(gt=0)]
    """That the process may use: "all threads"."""
    versions: dict[str, str]
    """Package -> version."""
    image_size: Annotated[int, Field(gt=0)]
    """Pixels."""
    reference: str
    """To what `times_smaller` and `times_as_fast` compare, in words."""
    entries: tuple[BenchmarkEntry, ...]

    @property
    def files(self) -> tuple[BenchmarkEntry, ...]:
        """One entry per file: several runtimes may have measured it."""
        return tuple({(entry.network, entry.file): entry for entry in reversed(self.entries)}.values())[::-1]

    def of_network(self, model_sha256: str | None) -> tuple[BenchmarkEntry, ...]:
        """The entries that were made from this model.safetensors."""
        return tuple(e for e in self.entries if model_sha256 is not None and e.model_sha256 == model_sha256)
