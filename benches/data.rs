//! The loader: pictures per second that it makes when the consumer takes them as fast as they come, with all cores.
//!
//! `shapes` draws scenes; `jpeg` reads photographs' sizes (512×384, quality 90) and brings them to 256×256 as LSUN's loader
//! does. `elem/s` is pictures per second.

use criterion::{Criterion, Throughput};
use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder};
use ldm::Result;
use ldm::data::folder::Folder;
use ldm::data::loader::{Loader, Options};
use ldm::data::shapes::{Split, World};
use ldm::data::source::{Drawn, Pictures, Source};
use ldm::data::transform::Transform;
use ldm::rng::Small;
use std::path::Path;

const BATCH: usize = 16;

fn main() -> Result<()> {
    let mut criterion = Criterion::default().configure_from_args();
    let world = World::new(0, 64, Split::Train)?;
    time(&mut criterion, "shapes 64x64", Drawn::new(world))?;
    time(
        &mut criterion,
        "shapes 64x64 with extras",
        Drawn::new(world).with_extras().with_low_resolution(4)?,
    )?;
    let path = std::env::temp_dir().join(format!("ldm-bench-data-{}", std::process::id()));
    photographs(&path).map_err(|e| ldm::Error::file(&path, e))?;
    let jpeg = Pictures::new(Folder::open(&path)?, Transform::square(256));
    let done = time(&mut criterion, "jpeg 512x384 to 256x256", jpeg);
    let _ = std::fs::remove_dir_all(&path);
    criterion.final_summary();
    done
}

fn time(criterion: &mut Criterion, name: &str, source: impl Source) -> Result<()> {
    let mut loader = Loader::at(source, Options { batch: BATCH, ..Options::default() }, 0)?;
    let mut group = criterion.benchmark_group("loader");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function(name, |b| b.iter(|| loader.next()));
    group.finish();
    Ok(())
}

/// Smooth shades with noise: what a camera sees, as far as a decoder's time goes.
fn photographs(path: &Path) -> std::io::Result<()> {
    let (width, height) = (512, 384);
    std::fs::create_dir_all(path)?;
    let mut draw = Small::new(1);
    for i in 0..32 {
        let shade =
            |x: usize, y: usize, c: usize| ((x * (c + 1) + y * (3 - c) + 40 * i) as f64 / 90.0).sin() * 80.0;
        let values = (0..width * height * 3).map(|k| shade(k / 3 % width, k / 3 / width, k % 3));
        let rgb: Vec<u8> = values.map(|v| (128.0 + v + 8.0 * draw.normal()) as u8).collect();
        let mut file = std::io::BufWriter::new(std::fs::File::create(path.join(format!("{i}.jpg")))?);
        let encoder = JpegEncoder::new_with_quality(&mut file, 90);
        let wrote = encoder.write_image(&rgb, width as u32, height as u32, ExtendedColorType::Rgb8);
        wrote.map_err(std::io::Error::other)?;
    }
    Ok(())
}
