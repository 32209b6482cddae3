//! The commands: one file each, one line in the list.

mod bench;
mod convert;
mod data;
mod eval;
mod info;
mod plot;
mod progress;
mod sample;
mod train;
mod verify;

use crate::error::{Error, Result};
use crate::io::{Prediction, atomic};
use crate::tensor::DType;
use clap::{Args, Parser, Subcommand};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

/// Latent diffusion: sample from Stable Diffusion checkpoints, and train such models, on a CPU or an NVIDIA GPU.
#[derive(Parser, Debug)]
#[command(name = "ldm", version, about, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed (or diverged, for verify; slower, for bench), 2 a request that cannot be met."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

macro_rules! commands {
    ($($(#[$doc:meta])* $Name:ident($file:ident),)+) => {
        #[derive(Subcommand, Debug)]
        enum Command { $($(#[$doc])* $Name($file::Arguments),)+ }

        impl Command {
            fn run(self) -> Result<ExitCode> {
                match self { $(Command::$Name(arguments) => $file::run(arguments),)+ }
            }
        }
    };
}

commands! {
    /// Make pictures from a prompt, or from a picture
    Sample(sample),
    /// Compare a checkpoint's results with tensors recorded from diffusers
    Verify(verify),
    /// Say what a checkpoint is, and what a picture costs
    Info(info),
    /// Make one file of a model's folder, or a folder of its file
    Convert(convert),
    /// Measure parts of a model: time, rates, memory, each operation
    Bench(bench),
    /// Make data sets to train on
    Data(data),
    /// Score pictures
    Eval(eval),
    /// Train an autoencoder or a diffusion model
    Train(train),
    /// Draw the course of a training run
    Plot(plot),
}

/// Beyond any machine's cores.
const MAX_THREADS: usize = 4096;

/// Size of the pictures.
#[derive(Args, Debug, Clone)]
struct SizeFlags {
    /// Pixels [default: what the model was made for]
    #[arg(short = 'W', long, value_parser = whole, allow_negative_numbers = true, value_name = "PIXELS")]
    width: Option<usize>,
    /// Pixels [default: what the model was made for]
    #[arg(short = 'H', long, value_parser = whole, allow_negative_numbers = true, value_name = "PIXELS")]
    height: Option<usize>,
}

/// What a checkpoint in one file may leave open.
#[derive(Args, Debug, Clone)]
struct PredictionFlag {
    /// What the UNet predicts, for a file of Stable Diffusion 2 that does not say: eps (512 pixels) or v (768)
    #[arg(long, value_name = "WHAT")]
    prediction: Option<Prediction>,
}

/// What every command that runs a model takes.
#[derive(Args, Debug, Clone)]
struct DeviceFlags {
    /// Where to run: auto (a GPU where there is one, else the CPU), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: String,
    /// Type of weights and activations: f32, f16 or bf16 [default: f32; for `sample` on a GPU that of the file]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// Threads of the CPU [default: all cores]
    #[arg(short, long, value_parser = whole, allow_negative_numbers = true, value_name = "N")]
    threads: Option<usize>,
}

impl DeviceFlags {
    fn open(&self) -> Result<crate::exec::Device> {
        if let Some(n) = self.threads.filter(|&n| n == 0 || n > MAX_THREADS) {
            return Err(Error::invalid(format!("--threads: want 1 to {MAX_THREADS}; got {n}")));
        }
        // This thread is one of the pool's, so that it works where it would wait, and hands nothing over. Fails only when
        // the pool is running already, which it is not: this is the first thing a command does.
        rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads.unwrap_or(0))
            .use_current_thread()
            .build_global()
            .map_err(|e| Error::invalid(format!("--threads: {e}")))?;
        crate::exec::Device::open(self.device.parse()?)
    }

    fn dtype(&self) -> Result<Option<DType>> {
        self.dtype.as_deref().map(str::parse).transpose()
    }
}

/// What the program's allocator has counted since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heap {
    /// Blocks that were asked for, or moved to grow.
    pub allocations: usize,
    /// Bytes that were asked for.
    pub allocated: usize,
    /// Bytes that were given back.
    pub freed: usize,
}

/// How the program's allocator is asked: it belongs to the process, as this does.
static HEAP: OnceLock<fn() -> Heap> = OnceLock::new();

/// The allocator's counts; `None` in a program that does not count.
fn heap() -> Option<Heap> {
    HEAP.get().map(|count| count())
}

/// Runs the program. `count` asks its allocator.
pub fn main(count: fn() -> Heap) -> ExitCode {
    let _ = HEAP.set(count);
    let cli = Cli::parse();
    match cli.command.run() {
        Ok(code) => code,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// Help for `--sampling-method`, from the list of samplers.
fn sampler_help() -> String {
    let names: Vec<&str> = crate::samplers::Method::ALL.iter().map(|m| m.name()).collect();
    let names = names.join(", ");
    format!("Sampler: {names}; also as in \"DPM++ 2M Karras\" or ddim_trailing [default: the checkpoint's]")
}

/// Checks, before any work, that a result can be written where it was asked for. A place that cannot take it is the
/// request's fault.
fn check_output(path: &Path) -> Result<()> {
    atomic::check_target(path).map_err(|e| Error::invalid(e.to_string()))
}

/// Checks, before any work, that there is something where an argument says so.
fn check_input(path: &Path, want: &str) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let path = path.display();
    Err(Error::invalid(format!("{path}: want {want}; there is nothing at this path: check its spelling")))
}

/// Pictures are PNG files, and are named so; a device may have any name.
fn check_png(path: &Path) -> Result<()> {
    let device = path.metadata().is_ok_and(|m| !m.is_file());
    if device || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{}: want a name that ends in .png, which is what is written",
        path.display()
    )))
}

/// A number of things, as an argument.
fn whole(text: &str) -> std::result::Result<usize, String> {
    use std::num::IntErrorKind::PosOverflow;
    text.parse().map_err(|e: std::num::ParseIntError| match e.kind() {
        PosOverflow => format!("want at most {}", usize::MAX),
        _ => "want a whole number that is not negative".into(),
    })
}

/// Prints to standard output; a reader that closed the pipe ends the program quietly.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(Error::file("<stdout>", e)),
        Ok(()) => Ok(()),
    }
}
