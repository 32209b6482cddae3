#!/usr/bin/env python3
"""Seconds of Stable Diffusion 1.5's UNet and decoder in ldm, PyTorch and candle, taking turns on one CPU.

    pip install torch==2.11 diffusers==0.37.1 transformers==4.57.6 safetensors
    cargo build --release --example 03_worker
    cargo build --release --manifest-path tools/peers/candle/Cargo.toml
    python tools/peers/compare.py FOLDER [--json FILE] [--readme README.md]

FOLDER is a checkpoint of Stable Diffusion 1.5 as diffusers lays it out. The weights' values do not matter for time:
`python tools/checkpoints.py OUT --only sd15` makes one with random weights, OUT/sd15.

Each engine is a process that has loaded its part and has run it twice before the clock counts. In every round each
runs once while the others sleep, and the one that begins changes from round to round; a row is the median over the
rounds. "PyTorch" is the fastest of its modes for the row: all of them are tried first, or those that --torch names.
Compiling takes minutes, so a sitting with all rows takes an hour or two. candle takes part in f32, if it is built.
Freshly mapped memory can be dear (in a virtual machine it cost PyTorch three quarters of a decoding), so glibc is told,
for every engine, to keep what it has.
"""
import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODES = ["eager", "eager-nhwc", "compiled", "compiled-nhwc"]
# component, side of the latents, batch, name in the table
WORK = [
    ("unet", 64, 2, "UNet 512×512, guidance batch 2"),
    ("unet", 32, 1, "UNet 256×256, batch 1"),
    ("vae-decoder", 64, 1, "VAE decoding 512×512"),
    ("vae-decoder", 32, 1, "VAE decoding 256×256"),
]
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


class Worker:
    """An engine's process. It has the machine only while `run` waits for it."""

    def __init__(self, command, threads):
        count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
        sleepy = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        environment = {**os.environ, **KEEP_MEMORY, **count, **sleepy}
        pipe = subprocess.PIPE
        self.command = [str(c) for c in command]
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.about = json.loads(self.line())

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)} ended with {self.process.wait()}")
        return line

    def run(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.line())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def machine():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    find = lambda key: next(iter(re.findall(rf"^{key}\s*: (.*)$", info, re.M)), "")
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": find("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "features": [f for f in wanted if f in find("flags").split()],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def commit():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def measure(a, component, side, batch, dtype):
    """One row: engine -> its description and its seconds, round by round."""
    part = [a.folder, component, side, batch, dtype]
    trial, fastest = {}, None
    for mode in a.torch:
        worker = Worker([a.python, HERE / "torch_worker.py", *part, mode, a.threads], a.threads)
        trial[mode] = [worker.run() for _ in range(2)]
        say(f"  PyTorch {mode}: {' '.join(f'{s:.3f}' for s in trial[mode])}")
        # Compiling takes minutes: the fastest so far stays.
        best = min(trial, key=lambda m: min(trial[m]))
        worker, fastest = (fastest, worker) if best == mode else (worker, fastest)
        if worker:
            worker.close()
    workers = {"ldm": Worker([a.ours, *part], a.threads)}
    if fastest:
        workers["PyTorch"] = fastest
    if dtype == "f32" and a.candle:
        workers["candle"] = Worker([a.candle, *part], a.threads)
    row = {name: {**worker.about, "seconds": []} for name, worker in workers.items()}
    names = list(workers)
    for i in range(a.rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            row[name]["seconds"].append(workers[name].run())
        say("  " + "  ".join(f"{name} {row[name]['seconds'][-1]:.3f}" for name in names))
    for worker in workers.values():
        worker.close()
    if trial:
        row["PyTorch"]["trial"] = trial
    return row


def say(text):
    print(text, file=sys.stderr, flush=True)


def table(report):
    """The rows as Markdown, with what they were measured on above them."""
    m, rows = report["machine"], report["rows"]
    versions = sorted({re.sub(r" (eager|compiled)[^,]*| f32$", "", e["engine"])
                       for row in rows for name, e in row["engines"].items() if name != "ldm"})
    features = ", ".join([f"{m['cores']} cores", *m["features"]])
    yield f"Seconds, medians of {report['rounds']} rounds in turn, {report['threads']} threads each; {m['cpu']} ({features}),"
    yield f"{report['date']}, commit {report['commit']}; {'; '.join(versions)}. PyTorch is the fastest of"
    yield f"{', '.join(report['torch']) or 'no mode'}: the table says which."
    yield ""
    yield "| Stable Diffusion 1.5 | ldm | PyTorch | candle | ldm / PyTorch | ldm / candle |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        engines = row["engines"]
        median = {name: statistics.median(e["seconds"]) for name, e in engines.items()}
        ratio = lambda name: f"{median['ldm'] / median[name]:.2f}" if name in median else ""
        mode = re.search(r"(eager|compiled)\S*?(?=,|$)", engines.get("PyTorch", {"engine": ""})["engine"])
        cells = [
            f"{row['name']}, {row['dtype']} ({engines['ldm']['flops'] / 1e9:,.0f} GFLOP)",
            f"{median['ldm']:.2f}",
            f"{median['PyTorch']:.2f} ({mode[0]})" if "PyTorch" in median else "",
            f"{median['candle']:.2f}" if "candle" in median else "",
            f"**{ratio('PyTorch')}**" if "PyTorch" in median else "",
            ratio("candle"),
        ]
        yield f"| {' | '.join(cells)} |"


def write_readme(path, text):
    """Between the two markers, and nowhere else."""
    begin, end = "<!-- compare.py writes from here -->", "<!-- to here -->"
    old = path.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(f"{path}: want one `{begin}` and one `{end}`")
    path.write_text(old[:old.index(begin) + len(begin)] + "\n" + text + "\n" + old[old.index(end):])


def main():
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    own = Path(os.environ.get("CARGO_TARGET_DIR", HERE / "candle" / "target"))
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", help="diffusers folder of a Stable Diffusion 1.5 checkpoint")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--component", choices=["unet", "vae-decoder"], help="that alone")
    ap.add_argument("--side", type=int, choices=[256, 512], help="pictures of that size alone")
    ap.add_argument("--dtype", choices=["f32", "bf16"], help="that alone")
    ap.add_argument("--torch", default="all", help=f"{', '.join(MODES)}, several with commas, or none; all by default")
    ap.add_argument("--python", default=sys.executable, help="that has PyTorch and diffusers")
    ap.add_argument("--ours", type=Path, default=target / "release/examples/03_worker")
    ap.add_argument("--candle", type=Path, default=own / "release/candle-worker")
    ap.add_argument("--json", type=Path, help="every second that was measured")
    ap.add_argument("--readme", type=Path, help="put the table between this file's markers")
    a = ap.parse_args()
    a.torch = {"all": MODES, "none": []}.get(a.torch) or [m for m in a.torch.split(",") if m != "none"]
    if unknown := [m for m in a.torch if m not in MODES]:
        ap.error(f"--torch {unknown[0]}: want {', '.join(MODES)}, all or none")
    if not a.ours.exists():
        ap.error(f"no {a.ours}: build it with `cargo build --release --example 03_worker`, or name it with --ours")
    if not a.candle.exists():
        say(f"no {a.candle}: candle is left out")
        a.candle = None
    chosen = [(w, t) for w in WORK for t in ("f32", "bf16")
              if a.component in (None, w[0]) and a.side in (None, 8 * w[1]) and a.dtype in (None, t)]
    report = {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine(),
              "threads": a.threads, "rounds": a.rounds, "torch": a.torch, "rows": []}
    for (component, side, batch, name), dtype in chosen:
        say(f"{name}, {dtype} (load {os.getloadavg()[0]:.2f})")
        engines = measure(a, component, side, batch, dtype)
        report["rows"].append({"name": name, "component": component, "size": 8 * side, "batch": batch,
                               "dtype": dtype, "engines": engines})
        if a.json:  # after every row: a sitting is long
            a.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    text = "\n".join(table(report))
    print(text)
    if a.readme:
        write_readme(a.readme, text)


if __name__ == "__main__":
    main()
