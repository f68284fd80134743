"""Finished networks as files for other programs: ONNX in float32 and int8, and torch.export programs."""
