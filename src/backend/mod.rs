//! Devices: where buffers live and rooms run.

pub mod cpu;
pub mod cuda;

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
            // A machine without a driver or a card uses the CPU. A card that cannot run this build is an error.
            DeviceName::Auto => match cuda::Cuda::count() {
                Ok(n) if n > 0 => cuda::Cuda::open(0).map(Device::Cuda),
                _ => Ok(Device::Cpu),
            },
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
    /// A GPU where one is found, else the CPU.
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
