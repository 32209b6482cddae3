#!/usr/bin/env python3
"""The UNet of Stable Diffusion 1.5 in plain PyTorch, for machines without diffusers: same modules, same names of weights.

    python3 gpu_unet.py --mode eager --out unet.jsonl        one evaluation on a GPU, one JSON line
    python3 gpu_unet.py --check                              equality with diffusers' own, small, on the CPU

Like the engine's step: two rows (guidance) of 64×64 latents and 77 tokens, channels last, bf16; `--dtype f32` is without TF32.
`--mode compiled` is torch.compile as it comes, `--mode max-autotune` the one that tries every kernel that it has, which takes
minutes: see `compile_candidates_here`. Attention is the flash kernel alone in 16-bit types: where that does not
take something, this fails. All modes replay a CUDA graph. Random weights of a fixed seed: their values do not matter for time.
"""
import argparse
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Resnet(nn.Module):
    def __init__(self, c_in, c_out, time, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, c, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context, c, bias=False)
        self.to_v = nn.Linear(context, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x, context):
        q, k, v = (
            t.view(t.shape[0], -1, self.heads, t.shape[-1] // self.heads).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Geglu(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.proj = nn.Linear(c, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net = nn.ModuleList([Geglu(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    def __init__(self, c, context, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))
        self.attn1 = Attention(c, c, heads)
        self.attn2 = Attention(c, context, heads)
        self.ff = FeedForward(c)

    def forward(self, x, context):
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, c, context, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([Block(c, context, heads)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, context):
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)
        y = self.transformer_blocks[0](y, context)
        return x + self.proj_out(y.reshape(b, h, w, c).permute(0, 3, 1, 2))


class Resample(nn.Module):
    def __init__(self, c, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Level(nn.Module):
    """A level of the way down or up. On the way up each resnet takes what the way down has left."""

    def __init__(self, inputs, c, time, groups, attention, resample):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(i, c, time, groups) for i in inputs])
        if attention:
            self.attentions = nn.ModuleList([Transformer(c, *attention, groups) for _ in inputs])
        if resample:
            setattr(self, f"{resample}samplers", nn.ModuleList([Resample(c, resample == "up")]))

    def forward(self, x, time, context, left=None):
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x if left is None else torch.cat([x, left.pop()], dim=1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            outputs.append(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
                outputs.append(x)
        return x, outputs


class Middle(nn.Module):
    def __init__(self, c, time, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(c, c, time, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(c, *attention, groups)])

    def forward(self, x, time, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class TimeEmbedding(nn.Module):
    def __init__(self, c, time):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c, time), nn.Linear(time, time)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """Attention everywhere but at the deepest level, as `cross` says."""

    def __init__(self, channels=(320, 640, 1280, 1280), cross=(1, 1, 1, 0), layers=2, heads=8, context=768, groups=32):
        super().__init__()
        time, n, attention = 4 * channels[0], len(channels), (context, heads)
        self.channels = channels[0]
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        left, c = [channels[0]], channels[0]
        for i, c_out in enumerate(channels):
            inputs, resample = [c] + [c_out] * (layers - 1), "down" if i + 1 < n else None
            self.down_blocks.append(Level(inputs, c_out, time, groups, attention if cross[i] else None, resample))
            left += [c_out] * (layers + (resample is not None))
            c = c_out
        self.mid_block = Middle(c, time, groups, attention)
        for i, c_out in reversed(list(enumerate(channels))):
            inputs = []
            for _ in range(layers + 1):
                inputs.append(c + left.pop())
                c = c_out
            self.up_blocks.append(
                Level(inputs, c_out, time, groups, attention if cross[i] else None, "up" if i > 0 else None)
            )
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, 4, 3, padding=1)

    def forward(self, x, timestep, context):
        half = self.channels // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = timestep.float()[:, None] * rates
        time = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        x = self.conv_in(x)
        left = [x]
        for level in self.down_blocks:
            x, outputs = level(x, time, context)
            left += outputs
        x = self.mid_block(x, time, context)
        for level in self.up_blocks:
            x, _ = level(x, time, context, left)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def check():
    """The largest difference from diffusers' UNet with the same weights, for a small configuration; and the real one's keys."""
    from diffusers import UNet2DConditionModel

    def theirs(channels, cross, layers, heads, context, groups):
        down = ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross]
        up = ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)]
        return UNet2DConditionModel(
            block_out_channels=channels, down_block_types=down, up_block_types=up, layers_per_block=layers,
            attention_head_dim=heads, cross_attention_dim=context, norm_num_groups=groups,
        )

    small = ((32, 64, 96), (1, 1, 0), 2, 4, 24, 8)
    torch.manual_seed(1)
    want, got = theirs(*small).eval(), UNet(*small).eval()
    got.load_state_dict(want.state_dict(), strict=True)
    x, t, context = torch.randn(2, 4, 16, 24), torch.tensor([7.0, 810.0]), torch.randn(2, 9, 24)
    with torch.inference_mode():
        a, b = want(x, t, context).sample, got(x, t, context)
    error = ((a - b).norm() / a.norm()).item()
    with torch.device("meta"):
        real = ((320, 640, 1280, 1280), (1, 1, 1, 0), 2, 8, 768, 32)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs(*real), UNet())]
    assert shapes[0] == shapes[1], "other weights than those of Stable Diffusion 1.5"
    assert error < 1e-5, f"relative difference {error:.1e}"
    print(f"relative difference {error:.1e}; {len(shapes[0])} weights of the same names and shapes")


def compile_candidates_here():
    """The kernels that max-autotune tries are compiled by threads of this process, not by its pool of processes.

    PyTorch 2.11 compiles them in the pool, and then each one again in this process, one by one while they are timed: 10 s in
    place of 0.5 s for each product, on a machine with 16 cores. What is tried and timed is the same. Another PyTorch may not have
    what this needs: it says so, and compiles as it does.
    """
    try:
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.select_algorithm import AlgorithmSelectorCache

        prepare, in_pool = AlgorithmSelectorCache.make_precompile_fn, AsyncCompile.__dict__["use_process_pool"]
    except (ImportError, AttributeError, KeyError) as missing:
        print(f"candidates are compiled as PyTorch {torch.__version__} does it: {missing!r}", file=sys.stderr)
        return

    def prepare_here(*args, **kwargs):
        AsyncCompile.use_process_pool = classmethod(lambda cls: False)
        try:
            return prepare(*args, **kwargs)
        finally:
            AsyncCompile.use_process_pool = in_pool

    AlgorithmSelectorCache.make_precompile_fn = prepare_here


def run(a):
    from gpu_torch import graphed, measure

    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[a.dtype]
    if a.device == "cuda" and dtype != torch.float32:
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(1)
    config = {"channels": (32, 64), "cross": (1, 0), "context": 32, "groups": 8} if a.tiny else {}
    with torch.device(a.device):
        unet = UNet(**config).eval().requires_grad_(False)
    unet = unet.to(dtype=dtype, memory_format=torch.channels_last)
    side, width = (8, 32) if a.tiny else (64, 768)
    x = torch.rand(2, 4, side, side, device=a.device).to(dtype, memory_format=torch.channels_last)
    t, context = torch.full((2,), 500.0, device=a.device), torch.rand(2, 77, width, device=a.device).to(dtype)
    args = (x, t, context)
    with torch.inference_mode():
        tuned = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}.get(a.mode)
        if a.mode == "max-autotune":
            compile_candidates_here()
        call = torch.compile(unet, mode=tuned, dynamic=False) if tuned else unet
        finite = bool(call(*args).isfinite().all())
        if a.wait:
            print("ready", file=sys.stderr, flush=True)
        while a.wait and not os.path.exists(a.wait):
            time.sleep(0.2)
        timed, graph = graphed(call, args) if a.device == "cuda" else (lambda: call(*args), False)
        warm, slice_ = (1.0, 0.2) if a.device == "cuda" else (0.0, 0.0)
        ms = measure(a.device, timed, warm, slice_) * 1e3
    name = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    result = {"part": "unet", "mode": a.mode, "dtype": a.dtype, "card": name, "torch": torch.__version__}
    return {**result, "graph": graph, "finite": finite, "milliseconds": round(ms, 4)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    p.add_argument("--mode", choices=["eager", "compiled", "max-autotune"], default="eager")
    p.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a small UNet, to try the script without a GPU: its times mean nothing")
    p.add_argument("--wait", metavar="FILE", help="compile, then wait until this file is there, then measure")
    p.add_argument("--out", help="a file of JSON lines, to which this one is added")
    a = p.parse_args()
    if a.check:
        return check()
    line = json.dumps(run(a))
    print(line)
    if a.out:
        with open(a.out, "a") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
