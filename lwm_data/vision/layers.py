"""Two of taming's layers, computed better on a CPU; their weights and their meaning stay.

    x --> GroupNorm -> SiLU -> conv -> GroupNorm -> SiLU -> conv --> + -->
      \\_______________________ (1x1 conv) ______________________/

Letters: B pictures, C channels, P places, one a pixel; 1 stands for an axis that is summed over.
"""

from __future__ import annotations

import torch
from taming.modules.diffusionmodules import model as taming
from torch import Tensor, nn
from torch.nn.functional import silu


def use_own_layers(model: nn.Module) -> None:
    """Let each GroupNorm and each ResnetBlock of taming in `model` compute as those below do."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
        elif type(module) is taming.ResnetBlock:
            module.__class__ = ResnetBlock


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, right for channels-last tensors on CPU too.

    torch 2.13 takes the variance there as E[x^2] - E[x]^2, which cancels: on a map of 1 +- 0.01 its float32 result is
    off by 0.5, its bfloat16 result by 12. White paper is such a map. So the mean is taken off first.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.is_contiguous():
            return super().forward(input)
        if input.dtype != torch.float32:  # mean by matmul: torch's own takes three times as long as the norm
            ones_1P = input.new_ones(1, input.shape[2] * input.shape[3])
            mean_BC11 = self._over_group((ones_1P @ _rows(input)).float() / ones_1P.shape[1])
            return super().forward(input - mean_BC11.to(input.dtype))
        centred = input - self._over_group(_rows(input).mean(1))
        scale_BC11 = (self._over_group(_rows(centred).square().mean(1)) + self.eps).rsqrt() * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], centred, scale_BC11)

    def _over_group(self, means: Tensor) -> Tensor:
        """Each channel's number replaced by the mean over its group, [batch, channels, 1, 1]."""
        groups = means.reshape(-1, self.num_groups, self.num_channels // self.num_groups)
        return groups.mean(2, keepdim=True).expand_as(groups).reshape(-1, self.num_channels, 1, 1)


def _rows(channels_last_BCHW: Tensor) -> Tensor:
    """[batch, height * width, channels], a view."""
    return channels_last_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


class ResnetBlock(taming.ResnetBlock):  # type: ignore[misc]  # taming has no types
    """taming's block with SiLU in one pass over memory in place of two, and in place where nothing is learned."""

    def forward(self, x: Tensor, temb: None) -> Tensor:
        in_place = not torch.is_grad_enabled()
        h = self.conv1(silu(self.norm1(x), in_place))
        h = self.conv2(silu(self.norm2(h), in_place))
        shortcut: Tensor = x if self.in_channels == self.out_channels else self.nin_shortcut(x)
        summed: Tensor = h.add_(shortcut) if in_place else h + shortcut
        return summed
