"""Gradients and loss curves of the small checkpoints from PyTorch autograd: tests/golden/train/*.safetensors.

    python tools/golden_train.py [PART …]

torch 2.11, diffusers 0.37.1, f32 on the CPU. For each parameter of the model (in the names and axes of its checkpoint): the norm
of its gradient, and up to 256 of its elements, those at i · 7919 mod n. The losses of AdamW steps with one thread are recorded,
and by how much two threads, and the same steps in f64, differ from them (rounding grows from step to step).
"""

import copy
import pathlib
import sys

import diffusers
import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden"
SAMPLES = 256
STEPS = 100


def sampled(x, samples):
    flat = x.flatten()
    n = flat.numel()
    count = min(n, samples)
    at = torch.arange(count) * 7919 % n if n > samples else torch.arange(n)
    return flat[at].contiguous()


def gradients(model, samples=SAMPLES):
    out = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        out[f"grad.{name}"] = sampled(p.grad, samples)
        out[f"norm.{name}"] = p.grad.norm().reshape(1)
    return out


def curve(model, loss, threads, rate, dtype=torch.float32):
    torch.set_num_threads(threads)
    model = copy.deepcopy(model).to(dtype)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    losses = []
    for step in range(STEPS):
        optimiser.zero_grad()
        value = loss(model, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(value.item())
    return torch.tensor(losses)


def write(name, tensors, metadata):
    metadata = {"torch": torch.__version__, "diffusers": diffusers.__version__, **metadata}
    save_file({k: v.contiguous() for k, v in tensors.items()}, GOLDEN / "train" / f"{name}.safetensors", metadata)


def record(name, model, inputs, loss, rate, samples=SAMPLES):
    torch.set_num_threads(1)
    model.zero_grad()
    value = loss(model, 0)
    value.backward()
    tensors = {**inputs, **gradients(model, samples), "loss": value.detach().reshape(1)}
    one, two = curve(model, loss, 1, rate), curve(model, loss, 2, rate)
    exact = curve(model, loss, 2, rate, torch.float64)
    tensors["curve"] = one
    differs = max(((one - other).abs() / one.abs()).max().item() for other in (two, exact))
    write(name, tensors, {"differs": str(differs), "rate": str(rate)})
    print(name, value.item(), one[-1].item(), differs)


def unet():
    model = diffusers.UNet2DConditionModel.from_pretrained(GOLDEN / "sd15-tiny" / "unet", torch_dtype=torch.float32)
    model.train()
    g = torch.Generator().manual_seed(1)
    sets = 4
    x = torch.randn(sets, 2, 4, 16, 16, generator=g)
    target = torch.randn(sets, 2, 4, 16, 16, generator=g)
    context = torch.randn(sets, 2, 9, 32, generator=g)
    t = torch.randint(0, 1000, (sets, 2), generator=g)

    def loss(model, step):
        k = step % sets
        to = model.dtype
        y = model(x[k].to(to), t[k], context[k].to(to), return_dict=False)[0]
        return torch.nn.functional.mse_loss(y, target[k].to(to))

    # Pictures channels last, as the engine has them.
    last = lambda a: a.permute(0, 1, 3, 4, 2)
    record("unet", model, {"x": last(x), "target": last(target), "context": context, "t": t.float()}, loss, 1e-4)


def inpainting():
    """Mask and masked latents as diffusers' pipeline makes them of pictures, and steps of the UNet with both beside its latents."""
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(GOLDEN / "inpaint-tiny", torch_dtype=torch.float32)
    model = pipe.unet.train()
    g = torch.Generator().manual_seed(6)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), generator=g).to(torch.uint8).numpy()
    holes = np.zeros((2, 32, 32), np.uint8)
    holes[0, 5:18, 3:30] = holes[1, 16:, :9] = 255
    picture = pipe.image_processor.preprocess([PIL.Image.fromarray(p) for p in pixels])
    mask = pipe.mask_processor.preprocess([PIL.Image.fromarray(h) for h in holes])
    masked = picture * (mask < 0.5)
    shape = (2, 4, 16, 16)
    draw = lambda: torch.Generator().manual_seed(7)
    with torch.no_grad():
        channels = pipe.prepare_mask_latents(mask, masked, 2, 32, 32, torch.float32, "cpu", draw(), False)
    channels = torch.cat(channels, dim=1)
    sets = 4
    noisy = torch.randn(sets, *shape, generator=g)
    target = torch.randn(sets, *shape, generator=g)
    context = torch.randn(sets, 2, 9, 32, generator=g)
    t = torch.randint(0, 1000, (sets, 2), generator=g)
    x = torch.stack([torch.cat([latents, channels], dim=1) for latents in noisy])

    def loss(model, step):
        k = step % sets
        to = model.dtype
        y = model(x[k].to(to), t[k], context[k].to(to), return_dict=False)[0]
        return torch.nn.functional.mse_loss(y, target[k].to(to))

    last = lambda a: a.movedim(-3, -1)
    inputs = {
        "picture": last(picture),
        "mask": mask[:, 0],
        "noise": last(torch.randn(shape, generator=draw())),
        "channels": last(channels),
        **{"x": last(x), "target": last(target), "context": context, "t": t.float()},
    }
    record("inpainting", model, inputs, loss, 1e-4, samples=64)


def kl():
    model = diffusers.AutoencoderKL.from_pretrained(GOLDEN / "sd15-tiny" / "vae", torch_dtype=torch.float32)
    model.train()
    g = torch.Generator().manual_seed(2)
    sets = 4
    x = torch.rand(sets, 2, 3, 32, 32, generator=g) * 2 - 1
    shape = model.encode(x[0]).latent_dist.mean.shape
    noise = torch.randn(sets, *shape, generator=g)

    def loss(model, step):
        k = step % sets
        to = model.dtype
        d = model.encode(x[k].to(to)).latent_dist
        y = model.decode(d.mean + d.std * noise[k].to(to), return_dict=False)[0]
        return torch.nn.functional.l1_loss(y, x[k].to(to)) + 1e-4 * d.kl().mean()

    last = lambda a: a.permute(0, 1, 3, 4, 2)
    record("kl", model, {"x": last(x), "noise": last(noise)}, loss, 4.5e-5)


def unconditional():
    torch.manual_seed(4)
    model = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    model.save_pretrained(GOLDEN / "uncond-tiny" / "unet")
    model.train()
    g = torch.Generator().manual_seed(3)
    sets = 4
    x = torch.randn(sets, 2, 3, 16, 16, generator=g)
    target = torch.randn(sets, 2, 3, 16, 16, generator=g)
    t = torch.randint(0, 1000, (sets, 2), generator=g)

    def loss(model, step):
        k = step % sets
        y = model(x[k].to(model.dtype), t[k], return_dict=False)[0]
        return torch.nn.functional.huber_loss(y, target[k].to(model.dtype), delta=0.5)

    last = lambda a: a.permute(0, 1, 3, 4, 2)
    record("unet_2d", model, {"x": last(x), "target": last(target), "t": t.float()}, loss, 1e-4)


class ActNorm(torch.nn.Module):
    """Shift and scale by channel (Kingma and Dhariwal 2018) that start as those that make the first batch normal."""

    def __init__(self, c):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(1, c, 1, 1))
        self.scale = torch.nn.Parameter(torch.ones(1, c, 1, 1))
        self.started = False

    def forward(self, x):
        if not self.started:
            self.loc.data = -x.detach().mean((0, 2, 3), keepdim=True)
            self.scale.data = 1 / (x.detach().std((0, 2, 3), keepdim=True) + 1e-6)
            self.started = True
        return self.scale * (x + self.loc)


class Discriminator(torch.nn.Module):
    """Of patches (Isola et al. 2017): 4x4 convolutions, norms, leaky ReLU; the layout of names is CompVis's."""

    def __init__(self, width, layers, norm=torch.nn.BatchNorm2d):
        super().__init__()
        wide = lambda n: width * 2 ** min(n, 3)
        leaky = lambda: torch.nn.LeakyReLU(0.2)
        parts = [torch.nn.Conv2d(3, width, 4, 2, 1), leaky()]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            parts += [torch.nn.Conv2d(wide(n - 1), wide(n), 4, stride, 1, bias=norm is ActNorm)]
            parts += [norm(wide(n)), leaky()]
        self.main = torch.nn.Sequential(*parts, torch.nn.Conv2d(wide(layers), 1, 4, 1, 1))

    def forward(self, x):
        return self.main(x)


class Lpips(torch.nn.Module):
    """The perceptual distance (Zhang et al. 2018) on a narrow network of VGG16's depth, with torchvision's names."""

    def __init__(self, channels):
        super().__init__()
        parts, self.taps, wide = [], [], 3
        for stage, (layers, c) in enumerate(zip((2, 2, 3, 3, 3), channels)):
            parts += [torch.nn.MaxPool2d(2)] if stage else []
            for _ in range(layers):
                parts += [torch.nn.Conv2d(wide, c, 3, 1, 1), torch.nn.ReLU()]
                wide = c
            self.taps.append(len(parts) - 1)
        self.features = torch.nn.Sequential(*parts)
        for i, c in enumerate(channels):
            head = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Conv2d(c, 1, 1, bias=False))
            self.add_module(f"lin{i}", torch.nn.ModuleDict({"model": head}))
        for key, p in self.named_parameters():
            p.requires_grad_(False)
            if p.dim() == 4 and "lin" not in key:
                torch.nn.init.kaiming_normal_(p)
            elif "lin" in key:
                p.uniform_(0.2, 1.0)

    def unit(self, x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift.to(x)[:, None, None]) / scale.to(x)[:, None, None]
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a, b):
        heads = [getattr(self, f"lin{i}")["model"] for i in range(5)]
        return sum(h((a - b) ** 2).mean((1, 2, 3)) for h, a, b in zip(heads, self.unit(a), self.unit(b)))


# 4.5e-6 for each picture of the batch, as CompVis's configurations have it.
RATE = 9e-6
ADAM = {"lr": RATE, "betas": (0.5, 0.9), "eps": 1e-8}
CLOSE = 1e-4


def seen(inputs):
    """What the steps see: pictures of 2x2 squares, each -1 or 1 in each channel as the sign of every eighth value says, and the
    upper left quarter of the noise."""
    squares = torch.where(inputs["x"][..., :16:8, :16:8] < 0, -1.0, 1.0)
    out = {"x": squares.repeat_interleave(8, 2).repeat_interleave(8, 3)}
    return out | {k: v[..., : v.shape[-2] // 2, : v.shape[-1] // 2] for k, v in inputs.items() if k != "x"}


def adversarial(name, model, inputs, forward, weight, hinge, extra={}, norm=torch.nn.BatchNorm2d):
    """Gradients and losses of both sides, each from the weights before a step. `forward` gives the reconstruction, its
    likelihood term, and the weighted rest. At the kinks of the losses (absolute values, hinge, leaky ReLU, nearest codes)
    rounding decides: where one run is on the other side of one, it parts from the others within a few steps, by up to a third
    of the loss, also PyTorch's with two threads from that with one. So discriminators are tried until one is found with which
    PyTorch's own runs (two threads, f64, and starts that are shaken by as much as rounding) stay together over all steps."""
    for seed in range(1000):
        if record_adversarial(name, model, inputs, forward, weight, hinge, extra, norm, seed):
            return


def record_adversarial(name, model, inputs, forward, weight, hinge, extra, norm, seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    judge = Discriminator(4, 2, norm).train()
    # As large as after some training: at the start, with 0.02, its gradients are tiny.
    for key, p in judge.named_parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and key.endswith("weight") else 0.0, 0.2)
    # The first that it sees: of norms that start with their first batch.
    if norm is ActNorm:
        judge(forward(model, inputs)[0])
    start = {f"start.{k}": v.clone() for k, v in judge.state_dict().items() if "num_batches" not in k}
    relu, softplus = torch.nn.functional.relu, torch.nn.functional.softplus
    real_loss, fake_loss = (
        (lambda v: relu(1 - v), lambda v: relu(1 + v)) if hinge else (lambda v: softplus(-v), softplus)
    )

    def losses(model, judge, inputs):
        y, likelihood, rest = forward(model, inputs)
        fake, real = judge(y), judge(inputs["x"])
        generator, last = -fake.mean(), model.decoder.conv_out.weight
        norm = lambda v: torch.autograd.grad(v, last, retain_graph=True)[0].norm()
        adaptive = (norm(likelihood) / (norm(generator) + 1e-4)).clamp(0, 1e4).detach() * weight
        total = likelihood + rest + adaptive * generator
        return total, 0.5 * (real_loss(real).mean() + fake_loss(fake).mean()), adaptive

    def backward(model, judge, inputs):
        total, lost, adaptive = losses(model, judge, inputs)
        for m, value in ((model, total), (judge, lost)):
            ps = list(m.parameters())
            for p, d in zip(ps, torch.autograd.grad(value, ps, retain_graph=True)):
                p.grad = d
        return total, lost, adaptive

    def steps(to, threads, shaken=0):
        """The losses of each step, and the discriminator."""
        m, j = copy.deepcopy(model).to(to), copy.deepcopy(judge).to(to)
        # Verdicts as small as at the start of a run.
        j.main[-1].weight.data *= 0.125
        if shaken:
            torch.manual_seed(shaken)
            for p in [*m.parameters(), *j.parameters()]:
                p.data *= 1 + 6e-8 * torch.randn_like(p)
        small = {k: v.to(to) for k, v in seen(inputs).items()}
        adam = [torch.optim.Adam(side.parameters(), **ADAM) for side in (m, j)]
        for _ in range(STEPS):
            torch.set_num_threads(threads)
            total, lost, _ = backward(m, j, small)
            [a.step() for a in adam]
            yield torch.tensor([total.item(), lost.item()], dtype=torch.float64), j

    extras = {}
    # With a perceptual term there is always some kink near: its gradients are recorded, there is no curve.
    if not extra:
        single, double = torch.float32, torch.float64
        runs = {f"shaken-{k}": steps(single, 1, k) for k in range(1, 5)} | {"exact": steps(double, 1)}
        differs, curve = dict.fromkeys([*runs, "threads"], 0.0), []

        def parts(step, key, run):
            ((other, _), one) = next(run), curve[step]
            differs[key] = max(differs[key], ((one - other).abs() / one.abs()).max().item())
            if differs[key] > CLOSE:
                print(name, seed, "parts at step", step, key, flush=True)
            return differs[key] > CLOSE

        for step, (one, after) in enumerate(steps(single, 1)):
            curve.append(one)
            if any(parts(step, key, run) for key, run in runs.items()):
                return False
        two = steps(single, 2)
        if any(parts(step, "threads", two) for step in range(STEPS)):
            return False
        assert differs["threads"] > 0, "two threads sum in the order of one"
        running = {f"after.{k}": v for k, v in after.state_dict().items() if "running" in k}
        extras = {"curve": torch.stack(curve).float(), **running}
    torch.set_num_threads(1)
    total, lost, adaptive = backward(model, judge, inputs)
    own = {**gradients(model), **{k.replace(".", ".discriminator.", 1): v for k, v in gradients(judge).items()}}
    if not extra:
        # Nor is a kink near those gradients.
        sides = [copy.deepcopy(side).double() for side in (model, judge)]
        backward(*sides, {k: v.double() for k, v in inputs.items()})
        for side, exact in zip((model, judge), sides):
            floor = 1e-3 * sum(p.grad.norm() ** 2 for p in side.parameters()).sqrt()
            for p, q in zip(side.parameters(), exact.parameters()):
                if (p.grad - q.grad).norm() > 3e-5 * (p.grad.norm() + floor):
                    print(name, seed, "a kink in the gradients")
                    return False
    last = lambda a: a.permute(0, 2, 3, 1)
    if not extra:
        # In evaluation mode, with the weights before the steps and the running statistics after them.
        judge.load_state_dict({k: v for k, v in after.state_dict().items() if "running" in k}, strict=False)
        extras["judged"] = last(judge.eval()(inputs["x"]).detach())
    scalars = {"loss": total, "discriminator.loss": lost, "adaptive_weight": adaptive}
    scalars = {k: v.detach().reshape(1) for k, v in scalars.items()}
    pictures = {k: last(v) for k, v in inputs.items()}
    notes = {"rate": str(RATE), "eps": str(ADAM["eps"])}
    if not extra:
        notes |= {"threads": str(differs["threads"]), "exact": str(differs["exact"])}
        print(name, seed, curve[0].tolist(), curve[-1].tolist(), differs)
    write(name, {**pictures, **extra, **start, **own, **scalars, **extras}, notes)
    return True


def kl_adversarial():
    model = diffusers.AutoencoderKL.from_pretrained(GOLDEN / "sd15-tiny" / "vae", torch_dtype=torch.float32).train()
    g = torch.Generator().manual_seed(3)
    x = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    noise = torch.randn(model.encode(x).latent_dist.mean.shape, generator=g)

    def forward(model, inputs):
        d = model.encode(inputs["x"]).latent_dist
        y = model.decode(d.mean + d.std * inputs["noise"], return_dict=False)[0]
        return y, (y - inputs["x"]).abs().sum() / len(y), 1e-6 * d.kl().mean()

    adversarial("kl-hinge", model, {"x": x, "noise": noise}, forward, 0.5, True)


def vq_adversarial(legacy, norm=torch.nn.BatchNorm2d):
    model = diffusers.VQModel.from_pretrained(GOLDEN / "vq4-tiny" / "vqvae", torch_dtype=torch.float32).train()
    g = torch.Generator().manual_seed(4)
    x = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    model.quantize.legacy = legacy
    torch.manual_seed(5)
    lpips = Lpips((4, 4, 8, 8, 8))
    extra = {} if legacy else {f"lpips.{k}": v for k, v in lpips.state_dict().items()}

    def forward(model, inputs):
        z = model.encode(inputs["x"]).latents
        q, loss, _ = model.quantize(z)
        y = model.decoder(model.post_quant_conv(q))
        likelihood = (y - inputs["x"]).abs().mean()
        if not legacy:
            likelihood = likelihood + 0.7 * copy.deepcopy(lpips).to(y.dtype)(y, inputs["x"]).mean()
        return y, likelihood, loss

    name = "vq-actnorm" if norm is ActNorm else "vq-vanilla" if legacy else "vq-hinge"
    adversarial(name, model, {"x": x}, forward, 0.8, not legacy, extra, norm)


PARTS = {
    "unet": unet,
    "inpainting": inpainting,
    "kl": kl,
    "unconditional": unconditional,
    "kl-hinge": kl_adversarial,
    "vq-vanilla": lambda: vq_adversarial(True),
    "vq-hinge": lambda: vq_adversarial(False),
    "vq-actnorm": lambda: vq_adversarial(True, ActNorm),
}
for part in sys.argv[1:] or PARTS:
    PARTS[part]()
