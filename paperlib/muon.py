"""Muon: every step of a weight matrix has singular values of about 1 (choice; K. Jordan et al. 2024).

torch.optim.Muon does the same, one matrix after the other and in bf16 only, which most CPUs emulate a hundred times
slower than fp32. Here all matrices of a shape are handled at once, in the precision that the device is fast in.
"""

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw": a learning rate that suits AdamW suits it.

    A step adds to each matrix (a, b) lr * 0.2 * sqrt(max(a, b)) times the orthogonalised Nesterov momentum, after
    decoupled weight decay. bf16: whether the orthogonalisation is done in bf16, else in the matrices' own precision.
    """

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95, bf16: bool = False
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                means = [self._mean(matrix) for matrix in matrices]
                gradients = [matrix.grad for matrix in matrices]
                torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(gradients, means, group["momentum"]))
                updates = orthogonal(nesterov.bfloat16() if self.bf16 else nesterov).to(nesterov.dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _mean(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["mean"] = torch.zeros_like(matrix)
        return state["mean"]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, a, b) with their singular values brought to about 1 (0.7..1.2) by five Newton-Schulz iterations;
    singular values below about 1e-3 of the matrix's norm stay smaller."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide is matrices else x.mT
