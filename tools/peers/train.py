"""A training step beside PyTorch's, taking turns: python tools/peers/train.py [--rounds 5] [--steps 3]

A UNet2DModel of 64, 128, 256 channels (16 M parameters), latents 32x32x4, batch 8, f32, mean squared error, gradients clipped to a norm of
1, AdamW; the same threads on both sides. Needs torch and diffusers, and `cargo build --release --example 03_train`. Prints the median of
the rounds (each the median of its steps, after one that is not counted) and the peak of memory of a process with either.
"""

import argparse
import json
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
SIDE, BATCH = 32, 8


def model():
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def torch_steps(steps, threads):
    """In a process of its own: prints seconds and peak memory as JSON."""
    import torch

    torch.set_num_threads(threads)
    net = model().train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)
    x, target = torch.randn(BATCH, 4, SIDE, SIDE), torch.randn(BATCH, 4, SIDE, SIDE)
    t, times = torch.arange(BATCH) * 100, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(net(x, t, return_dict=False)[0], target).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([statistics.median(times[1:]), peak]))


def timed(command):
    """Output of a command, and its peak of memory in KiB."""
    done = subprocess.run(["/usr/bin/time", "-f", "peak %M", *command], capture_output=True, text=True, check=True)
    return done.stdout, int(re.search(r"peak (\d+)", done.stderr)[1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--torch-only", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.torch_only:
        return torch_steps(a.steps, a.threads)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        model().save_config(folder)
        config = str(pathlib.Path(folder) / "config.json")
        for n in range(a.rounds):
            binary = str(ROOT / "target/release/examples/03_train")
            out, peak = timed([binary, config, str(SIDE), str(BATCH), str(a.steps)])
            ours.append((float(re.search(r"median ([\d.]+) s", out)[1]), peak))
            own = [sys.executable, __file__, "--torch-only", "--steps", str(a.steps), "--threads", str(a.threads)]
            theirs.append(tuple(json.loads(timed(own)[0].splitlines()[-1])))
            print(f"round {n + 1}: ldm {ours[-1][0]:.3f} s, PyTorch {theirs[-1][0]:.3f} s", flush=True)
    (s, m), (ts, tm) = ([statistics.median(column) for column in zip(*side)] for side in (ours, theirs))
    print(f"ldm {s:.3f} s, {m / 1e6:.2f} GB; PyTorch {ts:.3f} s, {tm / 1e6:.2f} GB: {s / ts:.2f} of its time, {m / tm:.2f} of its memory")


main()
