//! Pictures of others: PNG, JPEG and WebP, by what is in the file and not by its name.

use super::png::{self, MAX_PIXELS, Rgb8};
use crate::error::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader};
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Extensions of the files that are pictures, in lower case.
pub const EXTENSIONS: [&str; 4] = ["jpeg", "jpg", "png", "webp"];

/// Whether a file is a picture by its name.
pub fn is_picture(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|want| e.eq_ignore_ascii_case(want)))
}

/// Reads a picture as 8-bit RGB. Gray becomes RGB; transparency is ignored; a picture that its EXIF data says is turned is
/// turned upright. PNG is read by [`png::read_rgb8`], the others by the crate `image`.
///
/// # Errors
/// [`Error::File`] when the file is missing, is no such picture, is damaged or cut short, or has more than 2^28 pixels.
pub fn read(path: impl AsRef<Path>) -> Result<Rgb8> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return png::read_rgb8(path);
    }
    // A decoder that fails by a panic on a damaged file has failed on the file.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode(&bytes)));
    let decoded = decoded.unwrap_or_else(|_| Err("its decoder gave up".into()));
    let image = decoded.map_err(|what| Error::file(path, format!("not a readable picture: {what}")))?;
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Rgb8 { width, height, pixels: image.into_rgb8().into_raw(), parameters: None })
}

fn decode(bytes: &[u8]) -> std::result::Result<DynamicImage, String> {
    if bytes.starts_with(&[0xff, 0xd8]) && is_cut_short(bytes) {
        return Err("the JPEG data end too early; copy or download the file again".into());
    }
    let said = |e: image::ImageError| format!("{e} (want PNG, JPEG or WebP)");
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    let mut decoder = reader.into_decoder().map_err(said)?;
    let (width, height) = decoder.dimensions();
    if width as usize * height as usize > MAX_PIXELS {
        return Err(format!("want at most {MAX_PIXELS} pixels; got {width}x{height}"));
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(said)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Whether a JPEG lacks its end: the decoder would fill what is missing with gray, and say nothing. The coded data hold no
/// markers, so an end mark must come after the last start of a scan.
fn is_cut_short(bytes: &[u8]) -> bool {
    let last = |marker: u8| bytes.windows(2).rposition(|w| w == [0xff, marker]);
    last(0xd9) <= last(0xda)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;
    use image::codecs::{jpeg::JpegEncoder, webp::WebPEncoder};
    use image::{ExtendedColorType, ImageEncoder};

    /// A smooth picture, which JPEG keeps well.
    fn smooth(w: usize, h: usize) -> Vec<u8> {
        (0..w * h).flat_map(|i| [(i % w * 7) as u8, (i / w * 9) as u8, 90]).collect()
    }

    fn jpeg(w: usize, h: usize, exif: Option<Vec<u8>>) -> Vec<u8> {
        let mut out = vec![];
        let mut encoder = JpegEncoder::new_with_quality(&mut out, 95);
        if let Some(exif) = exif {
            encoder.set_exif_metadata(exif).unwrap();
        }
        encoder.write_image(&smooth(w, h), w as u32, h as u32, ExtendedColorType::Rgb8).unwrap();
        out
    }

    #[test]
    fn each_format_is_read_whatever_its_name() {
        let dir = Scratch::new("picture");
        let mut webp = vec![];
        WebPEncoder::new_lossless(&mut webp)
            .encode(&smooth(16, 12), 16, 12, ExtendedColorType::Rgb8)
            .unwrap();
        let png = png::encode_rgb8(16, 12, &smooth(16, 12), None).unwrap();
        for (name, bytes, off) in [("a.png", jpeg(16, 12, None), 6), ("b", webp, 0), ("c.jpg", png, 0)] {
            let got = read(dir.file(name, bytes)).unwrap();
            assert_eq!((got.width, got.height), (16, 12), "{name}");
            let worst = got.pixels.iter().zip(smooth(16, 12)).map(|(a, b)| a.abs_diff(b)).max();
            assert!(worst.unwrap() <= off, "{name}: off by {worst:?}");
        }
        let mut gray = vec![];
        JpegEncoder::new(&mut gray).write_image(&[200; 64], 8, 8, ExtendedColorType::L8).unwrap();
        let got = read(dir.file("g.jpg", gray)).unwrap();
        assert!(got.pixels.len() == 192 && got.pixels.iter().all(|v| v.abs_diff(200) < 3));
    }

    #[test]
    fn a_turned_photograph_is_turned_upright() {
        // TIFF header, one entry: orientation (0x0112) = 6, to be turned clockwise.
        let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
        let dir = Scratch::new("picture");
        let got = read(dir.file("t.jpg", jpeg(16, 12, Some(exif)))).unwrap();
        assert_eq!((got.width, got.height), (12, 16));
        // The lower left corner comes to the upper left.
        assert!(got.pixels[1].abs_diff(11 * 9) < 8, "{:?}", &got.pixels[..3]);
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        let dir = Scratch::new("picture");
        let whole = jpeg(32, 32, None);
        for n in 0..whole.len() - 1 {
            let e = read(dir.file("cut.jpg", &whole[..n])).err();
            let e = e.unwrap_or_else(|| panic!("{n} bytes of {} accepted", whole.len())).to_string();
            assert!(e.contains("cut.jpg"), "{e}");
        }
        for i in 0..whole.len() {
            let mut bad = whole.clone();
            bad[i] ^= 0x55;
            let _ = read(dir.file("bad.jpg", &bad));
        }
        for (bytes, say) in [(&b"hello"[..], "want PNG, JPEG or WebP"), (b"", "want PNG, JPEG or WebP")] {
            let e = read(dir.file("x.png", bytes)).unwrap_err().to_string();
            assert!(e.contains(say) && e.contains("x.png"), "{e}");
        }
        assert!(read(dir.path().join("none.jpg")).unwrap_err().to_string().contains("cannot be read"));
        assert!(read(dir.path()).is_err());
    }
}
