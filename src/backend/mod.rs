//! Devices: where buffers live and rooms run.

pub mod cpu;
pub mod cuda;
mod memory;

pub use memory::{Memory, peak};

use crate::error::{Error, Result};
use std::str::FromStr;

/// A device that runs graphs.
#[derive(Clone)]
pub enum Device {
    /// The host's cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(cuda::Cuda),
}

impl Device {
    /// Opens what a name asks for.
    ///
    /// # Errors
    /// [`Error::Device`] when it is not there.
    pub fn open(name: DeviceName) -> Result<Device> {
        match name {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda(n) => cuda::Cuda::open(n).map(Device::Cuda),
            // Where there is no driver, no card, or no kernel in this build, the CPU is what there is. A card that
            // fails to start is an error: it is not what the user expects to be left out.
            DeviceName::Auto if crate::kernels::COMPILED && cuda::Cuda::present() => {
                cuda::Cuda::open(0).map(Device::Cuda)
            }
            DeviceName::Auto => Ok(Device::Cpu),
        }
    }

    /// Bytes of memory that are free; `None` where nobody says.
    pub fn available(&self) -> Option<usize> {
        match self {
            Device::Cpu => cpu::available(),
            Device::Cuda(c) => c.memory().ok().map(|(free, _)| free),
        }
    }

    /// What a person calls it.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu => {
                format!("cpu ({} threads, {:?})", rayon::current_num_threads(), cpu::simd::Isa::best())
            }
            Device::Cuda(c) => format!("cuda ({})", c.name()),
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

/// The name of a device, as flags give it: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DeviceName {
    /// A GPU where there is one and this build has kernels for it, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = Error;
    fn from_str(s: &str) -> Result<DeviceName> {
        match s {
            "auto" => Ok(DeviceName::Auto),
            "cpu" => Ok(DeviceName::Cpu),
            "cuda" => Ok(DeviceName::Cuda(0)),
            _ => {
                s.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(DeviceName::Cuda).ok_or_else(|| {
                    Error::invalid(format!("device: want auto, cpu, cuda or cuda:N; got `{s}`"))
                })
            }
        }
    }
}
