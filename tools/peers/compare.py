#!/usr/bin/env python3
"""Seconds of Stable Diffusion 1.5's UNet and decoder in ldm, PyTorch and candle, taking turns on one CPU.

    pip install torch==2.11 diffusers==0.37.1 transformers==4.57.6 safetensors
    cargo build --release --example 03_worker
    cargo build --release --manifest-path tools/peers/candle/Cargo.toml --target-dir target/candle
    python tools/peers/compare.py FOLDER [--json FILE] [--readme README.md]

FOLDER is a checkpoint of Stable Diffusion 1.5 as diffusers lays it out. The weights' values do not matter for time:
`python tools/checkpoints.py OUT --only sd15` makes one with random weights, OUT/sd15.

Each engine is a process that has loaded its part and has run it twice before the clock counts. In every round each
runs once while the others sleep, and the one that begins changes from round to round; a row is the median over the
rounds. "PyTorch" is the fastest of its modes for the row: all of them are tried first, or those that --torch names.
Compiling takes minutes, so a sitting with all rows takes an hour or two. candle takes part in f32, if it is built.
Freshly mapped memory can be dear (in a virtual machine it cost PyTorch three quarters of a decoding), so glibc is told,
for every engine, to keep what it has. A run beside which other programs worked is repeated, and if that does not help,
the table says so. Linux only.
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
import time
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
TICKS = os.sysconf("SC_CLK_TCK")
# Of the cores, that others may have during a run; above it the run is measured again, twice at most.
OTHERS = 0.05
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
        """Seconds of a run; those that its threads were on a core; the share of the cores that others had meanwhile."""
        start, own, all_cores = time.perf_counter(), self.cpu(), busy()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = float(self.line())
        elapsed, own = time.perf_counter() - start, self.cpu() - own
        others = (busy() - all_cores - own) / (elapsed * os.cpu_count())
        return {"seconds": seconds, "cpu": round(own, 2), "others": round(max(others, 0.0), 3)}

    def cpu(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def busy():
    """Seconds that all cores together have worked since the machine began."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / TICKS


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
        trial[mode] = [quiet(worker) for _ in range(2)]
        say(f"  PyTorch {mode}: {' '.join(show(r) for r in trial[mode])}")
        # Compiling takes minutes: the fastest so far stays.
        best = min(trial, key=lambda m: min(r["seconds"] for r in trial[m]))
        worker, fastest = (fastest, worker) if best == mode else (worker, fastest)
        if worker:
            worker.close()
    workers = {"ldm": Worker([a.ours, *part], a.threads)}
    if fastest:
        workers["PyTorch"] = fastest
    if dtype == "f32" and a.candle:
        workers["candle"] = Worker([a.candle, *part], a.threads)
    row = {name: {**worker.about, "runs": []} for name, worker in workers.items()}
    names = list(workers)
    for i in range(a.rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            row[name]["runs"].append(quiet(workers[name]))
        say("  " + "  ".join(f"{name} {show(row[name]['runs'][-1])}" for name in names))
    for worker in workers.values():
        worker.close()
    if trial:
        row["PyTorch"]["trial"] = trial
    return row


def quiet(worker):
    """A run during which nobody else worked, or the quietest of three."""
    runs = []
    while len(runs) < 3 and not (runs and runs[-1]["others"] <= OTHERS):
        runs.append(worker.run())
    return min(runs, key=lambda r: r["others"])


def show(run):
    note = f" (others {run['others']:.0%})" if run["others"] > OTHERS else ""
    return f"{run['seconds']:.3f}{note}"


def say(text):
    print(text, file=sys.stderr, flush=True)


def table(report):
    """The rows as Markdown, with what they were measured on above them."""
    m, rows = report["machine"], report["rows"]
    versions = sorted({re.sub(r" (eager|compiled)[^,]*| f32$", "", e["engine"])
                       for row in rows for name, e in row["engines"].items() if name != "ldm"})
    features = ", ".join([f"{m['cores']} cores", *m["features"]])
    yield f"Seconds, medians of {report['rounds']} rounds in turn, {report['threads']} threads each;"
    yield f"{m['cpu']} ({features}),"
    yield f"{report['date']}, commit {report['commit']}; {'; '.join(versions)}. PyTorch is the fastest of"
    yield f"{', '.join(report['torch']) or 'no mode'}: the table says which."
    runs = [r for row in rows for e in row["engines"].values() for r in e["runs"]]
    if disturbed := sum(r["others"] > OTHERS for r in runs):
        yield f"**Other programs had more than {OTHERS:.0%} of the cores in {disturbed} of {len(runs)} runs.**"
    yield ""
    yield "| Stable Diffusion 1.5 | ldm | PyTorch | candle | ldm / PyTorch | ldm / candle |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        engines = row["engines"]
        median = {name: statistics.median(r["seconds"] for r in e["runs"]) for name, e in engines.items()}
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
    ap.add_argument("--candle", type=Path, default=ROOT / "target/candle/release/candle-worker")
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
