//! PNG pictures: written with the request that made them, read as 8-bit RGB.

use super::atomic;
use crate::error::{Error, Result};
use ::png::{BitDepth, ColorType, Decoder, DecodingError, Encoder, Transformations};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Keyword of the text chunk that holds the request, as the UIs of the field have it.
const KEYWORD: &str = "parameters";

/// No picture of the engine comes near this many pixels; a small file may claim far more.
pub(super) const MAX_PIXELS: usize = 1 << 28;

/// A picture.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rgb8 {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Shape (height, width, 3), 0 to 255.
    pub pixels: Vec<u8>,
    /// The text of the `parameters` chunk.
    pub parameters: Option<String>,
}

/// Writes a picture, atomically. `rgb` has shape (height, width, 3); `parameters` goes into a text chunk of that name:
/// `tEXt` where Latin-1 has all its characters, `iTXt` (UTF-8) where not.
///
/// # Errors
/// [`Error::Invalid`] when `rgb` is not of that size; [`Error::File`] when the file cannot be written.
pub fn write_rgb8(
    path: impl AsRef<Path>,
    width: usize,
    height: usize,
    rgb: &[u8],
    parameters: Option<&str>,
) -> Result<()> {
    atomic::write(path, &encode_rgb8(width, height, rgb, parameters)?)
}

/// The bytes of such a file.
///
/// # Errors
/// [`Error::Invalid`] when `rgb` is not of the size, or the size is 0 or beyond what PNG has.
pub fn encode_rgb8(width: usize, height: usize, rgb: &[u8], parameters: Option<&str>) -> Result<Vec<u8>> {
    let want = width.checked_mul(height).and_then(|n| n.checked_mul(3));
    if want != Some(rgb.len()) {
        return Err(Error::invalid(format!("picture: want {width}x{height}x3 bytes; got {}", rgb.len())));
    }
    let failed = |e: ::png::EncodingError| Error::invalid(format!("picture of {width}x{height}: {e}"));
    let side = |n: usize| {
        u32::try_from(n).map_err(|_| Error::invalid(format!("picture: a side of {n} is too long")))
    };
    let mut out = Vec::new();
    let mut encoder = Encoder::new(&mut out, side(width)?, side(height)?);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    if let Some(text) = parameters {
        // Neither kind of chunk can hold the character 0.
        let text = text.replace('\0', "\u{fffd}");
        // Latin-1 without its second set of control characters, which the format advises against.
        if text.chars().all(|c| c < '\u{80}' || ('\u{a0}'..='\u{ff}').contains(&c)) {
            encoder.add_text_chunk(KEYWORD.into(), text).map_err(failed)?;
        } else {
            encoder.add_itxt_chunk(KEYWORD.into(), text).map_err(failed)?;
        }
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(rgb).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(out)
}

/// Reads a picture. Gray, palettes and 16 bits are turned into 8-bit RGB; transparency is ignored.
///
/// # Errors
/// [`Error::File`] when the file is missing, is no PNG, is damaged, or has more than 2^28 pixels.
pub fn read_rgb8(path: impl AsRef<Path>) -> Result<Rgb8> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    let failed = |e: DecodingError| Error::file(path, format!("not a readable PNG picture: {e}"));
    let mut decoder = Decoder::new(BufReader::new(file));
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let mut reader = decoder.read_info().map_err(failed)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let size = reader.output_buffer_size().filter(|_| width.saturating_mul(height) <= MAX_PIXELS);
    let Some(size) = size else {
        let what = format!("want at most {MAX_PIXELS} pixels; got {width}x{height}");
        return Err(Error::file(path, what));
    };
    let mut buffer = vec![0; size];
    let frame = reader.next_frame(&mut buffer).map_err(failed)?;
    reader.finish().map_err(failed)?;
    let pixels: Vec<u8> = match frame.color_type {
        ColorType::Rgb => buffer,
        ColorType::Rgba => buffer.as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect(),
        ColorType::Grayscale => buffer.iter().flat_map(|&v| [v; 3]).collect(),
        ColorType::GrayscaleAlpha => buffer.as_chunks::<2>().0.iter().flat_map(|&[v, _]| [v; 3]).collect(),
        ColorType::Indexed => return Err(Error::file(path, "its palette could not be expanded")),
    };
    if pixels.len() != width * height * 3 {
        let what = format!("want {width}x{height}x3 bytes; its first frame has {}", pixels.len());
        return Err(Error::file(path, what));
    }
    let info = reader.info();
    let compressed = || info.compressed_latin1_text.iter().find(|c| c.keyword == KEYWORD)?.get_text().ok();
    let utf8 = || info.utf8_text.iter().find(|c| c.keyword == KEYWORD)?.get_text().ok();
    let plain = info.uncompressed_latin1_text.iter().find(|c| c.keyword == KEYWORD).map(|c| c.text.clone());
    let parameters = plain.or_else(utf8).or_else(compressed);
    Ok(Rgb8 { width, height, pixels, parameters })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    fn noise(n: usize) -> Vec<u8> {
        (0..n).map(|i| ((i * 2_654_435_761) >> 7) as u8).collect()
    }

    fn chunk_types(png: &[u8]) -> Vec<String> {
        let (mut at, mut all) = (8, vec![]);
        while at < png.len() {
            let n = u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
            all.push(String::from_utf8(png[at + 4..at + 8].to_vec()).unwrap());
            at += n + 12;
        }
        all
    }

    #[test]
    fn pictures_and_their_requests_come_back() {
        let dir = Scratch::new("png");
        for (text, chunk) in [
            (None, None),
            (Some("a photo\nNegative prompt: x\nSteps: 20, Seed: 1"), Some("tEXt")),
            (Some("café ÿ \u{a0}"), Some("tEXt")),
            (Some("猫 😀"), Some("iTXt")),
            (Some("\u{85}"), Some("iTXt")),
            (Some(""), Some("tEXt")),
        ] {
            let path = dir.path().join("x.png");
            let rgb = noise(7 * 5 * 3);
            write_rgb8(&path, 7, 5, &rgb, text).unwrap();
            let types = chunk_types(&std::fs::read(&path).unwrap());
            assert_eq!(types.iter().map(String::as_str).find(|t| t.ends_with("Xt")), chunk);
            let got = read_rgb8(&path).unwrap();
            assert_eq!(got, Rgb8 { width: 7, height: 5, pixels: rgb, parameters: text.map(str::to_owned) });
        }
        let bytes = encode_rgb8(1, 1, &[1, 2, 3], Some("a\0b")).unwrap();
        assert_eq!(read_rgb8(dir.file("n.png", bytes)).unwrap().parameters.unwrap(), "a\u{fffd}b");
    }

    #[test]
    fn other_colour_types_become_rgb() {
        let dir = Scratch::new("png");
        let write = |color, depth, data: &[u8], palette: Option<&[u8]>| {
            let mut out = Vec::new();
            let mut e = Encoder::new(&mut out, 2, 1);
            e.set_color(color);
            e.set_depth(depth);
            if let Some(p) = palette {
                e.set_palette(p.to_vec());
            }
            let mut w = e.write_header().unwrap();
            w.write_image_data(data).unwrap();
            w.finish().unwrap();
            read_rgb8(dir.file("x.png", out)).unwrap().pixels
        };
        assert_eq!(write(ColorType::Grayscale, BitDepth::Eight, &[9, 200], None), [9, 9, 9, 200, 200, 200]);
        assert_eq!(
            write(ColorType::Grayscale, BitDepth::One, &[0b0100_0000], None),
            [0, 0, 0, 255, 255, 255]
        );
        assert_eq!(
            write(ColorType::GrayscaleAlpha, BitDepth::Eight, &[9, 0, 8, 255], None),
            [9, 9, 9, 8, 8, 8]
        );
        assert_eq!(
            write(ColorType::Rgba, BitDepth::Eight, &[1, 2, 3, 0, 4, 5, 6, 9], None),
            [1, 2, 3, 4, 5, 6]
        );
        let indexed = write(ColorType::Indexed, BitDepth::Eight, &[1, 0], Some(&[1, 2, 3, 4, 5, 6]));
        assert_eq!(indexed, [4, 5, 6, 1, 2, 3]);
        let deep = [1, 99, 2, 99, 3, 99, 4, 99, 5, 99, 6, 99];
        assert_eq!(write(ColorType::Rgb, BitDepth::Sixteen, &deep, None), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        let dir = Scratch::new("png");
        let whole = encode_rgb8(6, 6, &noise(108), Some("p")).unwrap();
        for n in 0..whole.len() {
            let path = dir.file("cut.png", &whole[..n]);
            let e = read_rgb8(&path).err().unwrap_or_else(|| panic!("{n} bytes of {} accepted", whole.len()));
            assert!(e.to_string().contains("cut.png"));
        }
        for i in 0..whole.len() {
            let mut bad = whole.clone();
            bad[i] ^= 0x55;
            let _ = read_rgb8(dir.file("bad.png", &bad));
        }
        assert!(read_rgb8(dir.path().join("none.png")).unwrap_err().to_string().contains("cannot be opened"));
    }

    #[test]
    fn sizes_are_checked() {
        let text = |r: Result<Vec<u8>>| r.unwrap_err().to_string();
        assert!(text(encode_rgb8(2, 2, &[0; 11], None)).contains("want 2x2x3 bytes; got 11"));
        assert!(text(encode_rgb8(0, 2, &[], None)).contains("0x2"));
        assert!(encode_rgb8(usize::MAX, 2, &[], None).is_err());
        let dir = Scratch::new("png");
        let mut bomb = Vec::new();
        Encoder::new(&mut bomb, 60_000, 60_000).write_header().unwrap();
        assert!(read_rgb8(dir.file("bomb.png", bomb)).is_err());
    }
}
