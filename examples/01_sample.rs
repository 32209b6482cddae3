//! A picture from a prompt, in code: what `ldm sample` does, with a progress report of one's own.
//!
//!     cargo run --release --example 01_sample -- tests/golden/sd15-tiny "a lighthouse at night" out.png

use ldm::exec::{Device, DeviceName};
use ldm::io::{ModelFolder, png};
use ldm::pipeline::{Observer, Pipeline, Request};

struct Dots;

impl Observer for Dots {
    fn step(&mut self, done: usize, of: usize) -> ldm::Result<()> {
        eprint!("\r{done}/{of}");
        Ok(()) // an error here stops the run
    }
}

fn main() -> ldm::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = |what: &str| args.next().ok_or_else(|| ldm::Error::invalid(format!("want {what}")));
    let (model, prompt, file) = (next("a model folder")?, next("a prompt")?, next("a PNG to write")?);

    let device = Device::open(DeviceName::Auto)?;
    let pipeline = Pipeline::open(&ModelFolder::open(model)?, &device, None)?;
    let request = Request { prompt, steps: 20, seed: 1, ..Request::default() };
    for picture in pipeline.generate(&request, &mut Dots)? {
        png::write_rgb8(&file, picture.width, picture.height, &picture.rgb, None)?;
    }
    Ok(())
}
