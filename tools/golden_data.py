"""Reference values for `src/data`: resized pictures (Pillow, OpenCV), PSNR and SSIM (scikit-image).

    pip install pillow==13.0.0 opencv-python-headless==5.0.0 scikit-image==0.26.0
    python tools/golden_data.py tests/golden/data

Writes source.png, <filter>-<width>x<height>.png, and quality.json with the versions that made them.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL
import skimage
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

SIZES = [(24, 16), (31, 23), (48, 32), (17, 40), (120, 90)]
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "lanczos": Image.LANCZOS}


def picture(rng, width, height):
    """Smooth waves, a hard edge and some noise: what resizing gets wrong in different ways."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (3 + c)) * np.cos(y / (5 - c)) for c in range(3)], -1)
    rgb = 128 + 90 * waves + 20 * rng.standard_normal((height, width, 3))
    rgb[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 130)
    return np.clip(rgb.round(), 0, 255).astype(np.uint8)


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    source = picture(rng, 72, 48)
    Image.fromarray(source).save(out / "source.png")
    for size in SIZES:
        name = f"{size[0]}x{size[1]}.png"
        for filter, pil in FILTERS.items():
            Image.fromarray(source).resize(size, pil).save(out / f"{filter}-{name}")
        if size[0] <= 72 and size[1] <= 48:
            area = cv2.resize(source, size, interpolation=cv2.INTER_AREA)
            Image.fromarray(area).save(out / f"area-{name}")

    cases = []
    for name, noise, shift in [("noise", 8, 0), ("strong noise", 40, 0), ("brighter", 0, 12), ("same", 0, 0)]:
        changed = source + noise * rng.standard_normal(source.shape) + shift
        changed = np.clip(changed.round(), 0, 255).astype(np.uint8)
        file = f"{name.replace(' ', '-')}.png"
        Image.fromarray(changed).save(out / file)
        with np.errstate(divide="ignore"):
            psnr = float(peak_signal_noise_ratio(source, changed, data_range=255))
        ssim = structural_similarity(
            source,
            changed,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
        cases.append({"file": file, "psnr": psnr if np.isfinite(psnr) else None, "ssim": float(ssim)})
    versions = {"pillow": PIL.__version__, "opencv": cv2.__version__, "scikit-image": skimage.__version__}
    text = json.dumps({"versions": versions, "source": "source.png", "cases": cases}, indent=1)
    (out / "quality.json").write_text(text + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
