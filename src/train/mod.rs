//! Training: a step is one planned graph (forward, backward, optimiser, average of the weights), run on the same rooms and
//! devices that sample. A [`run()`] takes steps, and leaves checkpoints, metrics, pictures and a folder that samples.

mod autoencoder;
mod concat;
mod condition;
mod diffusion;
mod export;
mod first_stage;
mod frozen;
mod grid;
mod init;
mod latents;
mod memory;
mod objective;
mod perceptual;
mod rates;
mod run;
mod settings;
mod shown;
mod source;
mod step;
mod store;

pub use concat::Concatenated;
pub use diffusion::{Noised, diffusion_loss};
pub use first_stage::{Adversary, Codebook, FirstStageLoss, Gan, Side, initial_discriminator};
pub use frozen::{FirstStage, Reconstruction};
pub use init::{initial, is_zero_module};
pub use objective::{Levels, Objective};
pub use perceptual::{PerceptualDistance, PerceptualTerm};
pub use rates::{Schedule, average_decay};
pub use run::{Standing, Summary, Watch, run};
pub use settings::{
    AutoencoderSettings, Conditioned, DataSettings, DiffusionSettings, GivenEncoder, Kind, Parts,
    SampleSettings, Settings, TextKind,
};
pub use step::{Optimiser, Report, Trainer, blocks, update};
