//! How near one picture is to another: PSNR, and SSIM (Wang et al. 2004).

use crate::error::{Error, Result};
use crate::io::Rgb8;

/// Width of SSIM's window: a Gaussian of deviation 1.5, cut off at 3.5 deviations.
const WINDOW: usize = 11;
/// Largest value of a picture.
const RANGE: f64 = 255.0;

fn check(a: &Rgb8, b: &Rgb8) -> Result<()> {
    if (a.width, a.height, a.pixels.len()) != (b.width, b.height, b.pixels.len()) {
        let size = |p: &Rgb8| format!("{}x{}", p.width, p.height);
        return Err(Error::invalid(format!("want pictures of one size; got {} and {}", size(a), size(b))));
    }
    if a.pixels.is_empty() || a.pixels.len() != a.width * a.height * 3 {
        return Err(Error::invalid(format!("want a picture; got {}x{}", a.width, a.height)));
    }
    Ok(())
}

/// Peak signal to noise ratio in dB, over all pixels and channels; infinite for pictures that are the same.
///
/// # Errors
/// [`Error::Invalid`] when the sizes differ.
pub fn psnr(a: &Rgb8, b: &Rgb8) -> Result<f64> {
    check(a, b)?;
    let off = |(x, y): (&u8, &u8)| (f64::from(*x) - f64::from(*y)).powi(2);
    let mse = a.pixels.iter().zip(&b.pixels).map(off).sum::<f64>() / a.pixels.len() as f64;
    Ok(10.0 * (RANGE * RANGE / mse).log10())
}

/// Structural similarity, 1 for pictures that are the same: the mean over the channels and over the places where the window
/// lies inside. As scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255`.
///
/// # Errors
/// [`Error::Invalid`] when the sizes differ, or are below 11 pixels.
pub fn ssim(a: &Rgb8, b: &Rgb8) -> Result<f64> {
    check(a, b)?;
    let (width, height) = (a.width, a.height);
    if width < WINDOW || height < WINDOW {
        return Err(Error::invalid(format!(
            "SSIM: want pictures of at least {WINDOW}x{WINDOW}; got {width}x{height}"
        )));
    }
    let (c1, c2) = ((0.01 * RANGE).powi(2), (0.03 * RANGE).powi(2));
    let mut sum = 0.0;
    for channel in 0..3 {
        let values = |p: &Rgb8| -> Vec<f64> {
            p.pixels.iter().skip(channel).step_by(3).map(|v| f64::from(*v)).collect()
        };
        let (x, y) = (values(a), values(b));
        let mean = |of: &dyn Fn(f64, f64) -> f64| {
            let product: Vec<f64> = x.iter().zip(&y).map(|(x, y)| of(*x, *y)).collect();
            windowed(&product, width)
        };
        let [mx, my, xx, yy, xy] =
            [mean(&|x, _| x), mean(&|_, y| y), mean(&|x, _| x * x), mean(&|_, y| y * y), mean(&|x, y| x * y)];
        for i in 0..mx.len() {
            let (ux, uy) = (mx[i], my[i]);
            let (vx, vy, vxy) = (xx[i] - ux * ux, yy[i] - uy * uy, xy[i] - ux * uy);
            sum += (2.0 * ux * uy + c1) * (2.0 * vxy + c2) / ((ux * ux + uy * uy + c1) * (vx + vy + c2));
        }
    }
    Ok(sum / (3 * (width - WINDOW + 1) * (height - WINDOW + 1)) as f64)
}

/// Weighted means over the window, at all places where it lies inside.
fn windowed(x: &[f64], width: usize) -> Vec<f64> {
    let weight = |i: usize| (-(i as f64 - (WINDOW / 2) as f64).powi(2) / (2.0 * 1.5 * 1.5)).exp();
    let sum: f64 = (0..WINDOW).map(weight).sum();
    let taps: [f64; WINDOW] = std::array::from_fn(|i| weight(i) / sum);
    let along: Vec<f64> = x
        .chunks_exact(width)
        .flat_map(|row| row.windows(WINDOW).map(|w| w.iter().zip(&taps).map(|(x, t)| x * t).sum::<f64>()))
        .collect();
    let narrow = width - WINDOW + 1;
    let rows: Vec<&[f64]> = along.chunks_exact(narrow).collect();
    let column = |w: &[&[f64]], i: usize| w.iter().zip(&taps).map(|(row, t)| row[i] * t).sum::<f64>();
    rows.windows(WINDOW).flat_map(|w| (0..narrow).map(move |i| column(w, i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::png::read_rgb8;
    use std::path::Path;

    /// Against scikit-image: `tools/golden_data.py`.
    #[test]
    fn both_are_those_of_scikit_image() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
        let text = std::fs::read_to_string(folder.join("quality.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
        let source = read_rgb8(folder.join("source.png")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 4);
        for case in cases {
            let file = case["file"].as_str().unwrap();
            let other = read_rgb8(folder.join(file)).unwrap();
            let (p, s) = (psnr(&source, &other).unwrap(), ssim(&source, &other).unwrap());
            let want = case["psnr"].as_f64().unwrap_or(f64::INFINITY);
            assert!(p == want || (p - want).abs() < 1e-9, "{file}: PSNR want {want}; got {p}");
            let want = case["ssim"].as_f64().unwrap();
            assert!((s - want).abs() < 1e-9, "{file}: SSIM want {want}; got {s}");
        }
    }

    #[test]
    fn sizes_are_checked() {
        let picture =
            |w: usize, h: usize| Rgb8 { width: w, height: h, pixels: vec![9; w * h * 3], parameters: None };
        let e = psnr(&picture(4, 5), &picture(5, 4)).unwrap_err().to_string();
        assert!(e.contains("want pictures of one size; got 4x5 and 5x4"), "{e}");
        let e = ssim(&picture(10, 20), &picture(10, 20)).unwrap_err().to_string();
        assert!(e.contains("at least 11x11; got 10x20"), "{e}");
        assert_eq!(ssim(&picture(11, 11), &picture(11, 11)).unwrap(), 1.0);
        assert!(psnr(&picture(0, 0), &picture(0, 0)).is_err());
    }
}
