"""Writes tests/golden/randn.json and tests/golden/samplers/*.json from torch and diffusers (development only).

    python tools/golden_samplers.py                 random numbers, and every setting of the four samplers
    python tools/golden_samplers.py RECORDS_DIR     also extracts of recorded pipeline runs (*.pipe*.safetensors)

Made with torch 2.11 and diffusers 0.37.1 on x86-64. The network of the schedule cases is a formula in exactly
representable numbers, so that only the latents have to be stored.
"""

import json
import sys
from pathlib import Path

import torch

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


def bits(x):
    return [int(v) & 0xFFFFFFFF for v in x.reshape(-1).view(torch.int32)]


def fnv(words):
    h = 0xCBF29CE484222325
    for w in words:
        h = ((h ^ w) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def randn():
    cases = []
    for seed, sizes, long in [
        (0, [16], 4096),
        (1, [33, 48], 16384),
        (42, [1, 3, 15], 1000),
        (123456789012345, [17, 5, 20], 4097),
        (0xFFFFFFFF, [31], 65536 + 9),
    ]:
        g = torch.Generator().manual_seed(seed)
        drawn = [b for n in sizes for b in bits(torch.randn(n, generator=g))]
        g = torch.Generator().manual_seed(seed)
        h = fnv(bits(torch.randn(long, generator=g)))
        rand = bits(torch.rand(6, generator=torch.Generator().manual_seed(seed)))
        cases.append({"seed": seed, "sizes": sizes, "bits": drawn, "long": [long, h], "rand": rand})
    (GOLDEN / "randn.json").write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")


N = 6  # elements of a made-up latent
SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}
V = {"prediction_type": "v_prediction"}
COS = {"beta_schedule": "squaredcos_cap_v2"}
SHORT = {"skip_prk_steps": True, "num_train_timesteps": 20, "trained_betas": [0.01 * (i + 1) for i in range(20)]}
ZERO_SNR = {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def spaced(word):
    return {**SD, "timestep_spacing": word}


# sampler: diffusers class, settings as (name, config, steps, further)
COMMON = [("sd-%d" % n, SD, n, {}) for n in (1, 2, 4, 10, 30)]
COMMON += [("%s-%d" % (w, n), spaced(w), n, {}) for w in ("leading", "trailing", "linspace") for n in (3, 10)]
COMMON += [("v", {**SD, **V}, 6, {}), ("short", SHORT, 7, {}), ("cosine", {**SD, **COS}, 6, {})]
SAMPLE = [("sample", {**SD, "prediction_type": "sample"}, 5, {})]
SKIP = [("skip", SD, 10, {"skip": 4}), ("skip-trailing", spaced("trailing"), 6, {"skip": 1})]
KARRAS = [
    ("karras", {**SD, "use_karras_sigmas": True}, 10, {}),
    ("karras-trailing", {**spaced("trailing"), "use_karras_sigmas": True}, 5, {}),
    ("karras-cosine", {**SD, **COS, "use_karras_sigmas": True}, 6, {}),
    ("karras-v", {**SD, **V, "use_karras_sigmas": True}, 6, {}),
    ("sigma-min", {**SD, "final_sigmas_type": "sigma_min"}, 5, {}),
    ("zero-snr", ZERO_SNR, 5, {}),
    ("defaults", {}, 5, {}),
]
CASES = {
    "ddim": ("DDIMScheduler", COMMON + SAMPLE + SKIP + [
        ("defaults", {}, 5, {}),
        ("clip", {**SD, "clip_sample": True, "clip_sample_range": 1.5}, 5, {}),
        ("clip-v", {**SD, **V, "clip_sample": True}, 5, {}),
        ("alpha-one", {**SD, "set_alpha_to_one": True}, 5, {}),
        ("eta-half", SD, 5, {"eta": 0.5}),
        ("eta-one-clip", {**SD, "clip_sample": True, "set_alpha_to_one": True}, 5, {"eta": 1.0}),
        ("zero-snr", ZERO_SNR, 5, {}),
        ("zero-snr-eta", ZERO_SNR, 5, {"eta": 0.7}),
    ]),
    "pndm": ("PNDMScheduler", COMMON + [
        ("alpha-one", {**SD, "set_alpha_to_one": True}, 6, {}),
        ("v-linspace", {**spaced("linspace"), **V}, 6, {}),
        ("defaults", {"skip_prk_steps": True}, 5, {}),
    ]),
    "euler": ("EulerDiscreteScheduler", COMMON + SAMPLE + SKIP + KARRAS),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", COMMON + SAMPLE + SKIP + KARRAS + [
        ("euler-at-final", {**SD, "euler_at_final": True, "final_sigmas_type": "sigma_min"}, 20, {}),
        ("no-lower-order", {**SD, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, 6, {}),
        ("lambda-min", {**SD, **COS, "lambda_min_clipped": -5.1}, 6, {}),
    ]),
}


def made_up(i, a, b, c):
    """Exactly representable numbers from -2 to 2."""
    return torch.tensor([((i * a + j * b + c) % 257 - 128) / 64 for j in range(N)], dtype=torch.float32)


def numbers(x):
    return [float("%.9g" % v) for v in x.reshape(-1).tolist()]


def run(sampler, cls, name, config, steps, more):
    scheduler = cls.from_config(config)
    scheduler.set_timesteps(steps)
    skip, eta = more.get("skip", 0), more.get("eta", 0.0)
    times = scheduler.timesteps[skip:]
    x = made_up(0, 0, 53, 7)
    if hasattr(scheduler, "set_begin_index"):
        # Without it diffusers starts from the second of two equal timesteps, and ends beyond the ladder.
        scheduler.set_begin_index(skip)
    if skip:
        x = scheduler.add_noise(made_up(0, 0, 19, 91) / 2, x, times[:1])
    else:
        x = x * scheduler.init_noise_sigma
    case = {"sampler": sampler, "name": name, "config": config, "steps": steps, "skip": skip, "eta": eta}
    case |= {"timesteps": numbers(times), "start": numbers(x), "inputs": [], "latents": []}
    for k, t in enumerate(times):
        case["inputs"].append(numbers(scheduler.scale_model_input(x, t))[0])
        extra = {"eta": eta, "variance_noise": made_up(k, 71, 29, 3)} if eta else {}
        x = scheduler.step(made_up(k, 37, 101, 13), t, x, **extra).prev_sample
        case["latents"].append(numbers(x))
    return case


def schedulers():
    import diffusers

    diffusers.logging.set_verbosity_error()
    lines = []
    for sampler, (cls, settings) in CASES.items():
        for name, config, steps, more in settings:
            lines.append(json.dumps(run(sampler, getattr(diffusers, cls), name, config, steps, more)))
    (GOLDEN / "samplers" / "schedulers.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def recorded(folder, checkpoints, out):
    """Every 64th element of the latents and outputs of recorded pipelines, from folder/*.pipe*.safetensors."""
    from safetensors import safe_open

    lines = []
    for path in sorted(folder.glob("*.pipe*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["reference"])
            cut = lambda name: numbers(file.get_tensor(name).reshape(-1)[::64])
            every = lambda stem: [cut(k) for k in sorted(file.keys()) if k.startswith(stem + "_0")]
            strength = about.get("strength") or 1.0
            skip = about["steps"] - min(int(about["steps"] * strength), about["steps"])
            if not any(about["scheduler"] == cls for cls, _ in CASES.values()):
                continue
            config = json.loads((checkpoints / about["checkpoint"] / "scheduler" / "scheduler_config.json").read_text())
            lines.append(json.dumps({
                "sampler": about["scheduler"], "name": path.name, "config": config, "steps": about["steps"],
                "skip": skip, "eta": about["eta"], "timesteps": numbers(file.get_tensor("timesteps")),
                "start": cut("initial_latents"), "outputs": every("model_output"), "latents": every("latents"),
            }))
    out.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def betas():
    """float32 betas and running products at a few timesteps, with a hash over all of them."""
    import diffusers

    lines = []
    for name, config in [("sd", SD), ("linear", {}), ("cosine", COS), ("zero-snr", ZERO_SNR), ("short", SHORT),
                         ("vq", {**SD, "beta_start": 0.0015, "beta_end": 0.0195})]:
        s = diffusers.DDIMScheduler.from_config(config)
        lines.append(json.dumps({"name": name, "config": config, "betas": fnv(bits(s.betas)),
                                 "bars": fnv(bits(s.alphas_cumprod)), "first": numbers(s.alphas_cumprod[:3]),
                                 "last": numbers(s.alphas_cumprod[-3:])}))
    (GOLDEN / "samplers" / "betas.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    randn()
    schedulers()
    betas()
    for folder in map(Path, sys.argv[1:]):
        recorded(folder, folder, GOLDEN / "samplers" / "pipelines.json")
