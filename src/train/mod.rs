//! Training: a step is one planned graph (forward, backward, optimiser, average of the weights), run on the same rooms and
//! devices that sample.

mod first_stage;
mod init;
mod rates;
mod step;

pub use first_stage::{
    Adversary, Codebook, FirstStageLoss, Gan, PerceptualTerm, Side, initial_discriminator,
};
pub use init::{initial, is_zero_module};
pub use rates::{Schedule, average_decay};
pub use step::{Optimiser, Report, Trainer, update};
