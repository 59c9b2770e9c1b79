"""Two of taming's layers, computed better on a CPU; their weights and their meaning stay.

    x --> GroupNorm -> SiLU -> conv -> GroupNorm -> SiLU -> conv --> + -->      the branch, where the work is: bfloat16
      \\_______________________ (1x1 conv) ______________________/              the trunk, where codes are decided:
                                                                               float32

Letters: B pictures, C channels, P places, one a pixel; 1 stands for an axis that is summed over.
"""

from __future__ import annotations

import torch
from taming.modules.diffusionmodules import model as taming
from torch import Tensor, nn
from torch.nn.functional import linear, silu

STRIP = 1 << 17  # numbers; 512 KiB in float32


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
    """taming's block with SiLU in one pass over memory in place of two, and in place where nothing is learned.

    After `halve_branches` the branch is bfloat16 and what it is added to keeps its dtype. On a CPU `x` is then
    overwritten where nothing is learned: the map of the first level is 32 MiB, and such memory is slow to be had anew.
    """

    def forward(self, x: Tensor, temb: None) -> Tensor:
        in_place = not torch.is_grad_enabled()
        dtype = self.conv1.weight.dtype
        is_halved = dtype == torch.bfloat16 and x.dtype == torch.float32  # under autocast it is the other way round
        if is_halved and in_place and x.device.type == "cpu":
            return self._strip_by_strip(x)
        h = self.conv1(silu(self.norm1(x.to(dtype)), in_place))
        h = self.conv2(silu(self.norm2(h), in_place))
        shortcut: Tensor = x if self.in_channels == self.out_channels else self.nin_shortcut(x)
        summed: Tensor = h.add_(shortcut) if in_place and h.dtype == x.dtype else h + shortcut
        return summed

    def _strip_by_strip(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last), "rows of other layouts are copies, not views"
        h = self.conv1(_normed_silu(self.norm1, x))
        h = self.conv2(silu(self.norm2(h), inplace=True))
        if self.in_channels != self.out_channels:
            weight_OC = self.nin_shortcut.weight.flatten(1)  # as a matmul: torch's own 1x1 is three times as slow
            batch, _, height, width = x.shape
            rows_BPC = linear(_rows(x), weight_OC, self.nin_shortcut.bias)
            x = rows_BPC.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        for x_BPC, h_BPC in zip(_strips(x), _strips(h), strict=True):
            x_BPC.add_(h_BPC)
        return x


def halve_branches(model: nn.Module) -> None:
    """Let the branch of each ResnetBlock in `model` compute in bfloat16.

    What branches are added to, and all other layers, stay in float32: they are little work and decide the codes.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            for part in (module.norm1, module.conv1, module.norm2, module.conv2):
                nn.Module.to(part, torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _strips(channels_last_BCHW: Tensor) -> tuple[Tensor, ...]:
    """Views [batch, places, channels] of some rows each, small enough to stay in a core's cache."""
    return torch.split(_rows(channels_last_BCHW), max(1, STRIP // channels_last_BCHW.shape[1]), dim=1)


def _normed_silu(norm: GroupNorm, x_BCHW: Tensor) -> Tensor:
    """silu(norm(x)) of float32 as bfloat16; a number near the mean is taken off, so that the squares do not cancel."""
    strips = _strips(x_BCHW)
    about_B1C = strips[0].mean(1, keepdim=True)
    sums_B1C = torch.zeros_like(about_B1C)
    squares_B1C = torch.zeros_like(about_B1C)
    for strip in strips:
        near = strip - about_B1C
        ones = near.new_ones(1, 1, near.shape[1]).expand(len(near), -1, -1)
        sums_B1C += ones @ near
        squares_B1C += ones @ near.square_()
    num_places = x_BCHW.shape[2] * x_BCHW.shape[3]
    offset_B1C, power_B1C = sums_B1C / num_places, squares_B1C / num_places
    mean_B1C = norm._over_group(about_B1C + offset_B1C).flatten(1)[:, None]
    own_B1C = power_B1C - offset_B1C.square() + (about_B1C + offset_B1C - mean_B1C).square()
    variance_B1C = norm._over_group(own_B1C).flatten(1)[:, None].clamp(min=0)
    scale_B1C = (variance_B1C + norm.eps).rsqrt() * norm.weight.float()
    bias_B1C = norm.bias.float() - mean_B1C * scale_B1C
    out_BCHW = torch.empty_like(x_BCHW, dtype=torch.bfloat16)
    for strip, out in zip(strips, _strips(out_BCHW), strict=True):
        out.copy_(silu(torch.addcmul(bias_B1C, strip, scale_B1C), inplace=True))
    return out_BCHW
