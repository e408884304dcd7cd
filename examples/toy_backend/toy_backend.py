"""A backend outside the package: products of packed matrices are its own, everything else is the reference backend's.

pip install ./examples/toy_backend
python -c "from deepseek_optimizer import load_model; print(load_model('MODEL', backend='toy').report())"
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deepseek_optimizer.backends.base import DEFAULTS, Capabilities, CompileOptions
from deepseek_optimizer.backends.reference.backend import ReferenceBackend, ReferenceSizes
from deepseek_optimizer.backends.registry import BackendSettings, BackendSpec
from deepseek_optimizer.quant.packed import PackedMatrix


class ToyBackend(ReferenceBackend):
    """Implements `Backend`; compiles and stores as the reference does, and dequantizes a matrix whole for a product."""

    name = "toy"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name=self.name,
            device_type="cpu",
            phases=("decode", "prefill"),
            weight_formats=("fp32", "bf16", "int8"),
            kv_dtypes=("fp32", "bf16"),
            attention_modes=("flash", "eager"),
        )

    def linear(
        self, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None, options: CompileOptions = DEFAULTS
    ) -> torch.Tensor:
        return F.linear(x.float(), self.unpack(matrix), None if bias is None else bias.float())

    def linear_gradient(self, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        return grad.float() @ self.unpack(matrix)


def create(device: torch.device, settings: BackendSettings) -> ToyBackend:
    return ToyBackend(device)


SPEC = BackendSpec("toy", create, ReferenceSizes, device_types=("cpu",), priority=10)
