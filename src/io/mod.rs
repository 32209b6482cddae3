//! Files: checkpoints, their configurations, tokenizers, pictures.
//!
//! Everything that comes from outside is checked here, once, so that the rest of the engine may trust it.
//! A file that is damaged, of another kind, or newer than the engine is an error that names the file and what to do.

pub mod atomic;
pub mod chart;
mod clip_vocabulary;
pub(crate) mod compvis;
pub mod config;
mod convert;
pub mod events;
pub mod folder;
mod header;
pub mod labels;
pub mod mmap;
pub mod picture;
pub mod png;
pub(crate) mod single_file;
pub(crate) mod texts;
pub mod tokenizer;
pub mod vocabulary;
pub mod weights;
pub mod wordpiece;

mod words;

pub use config::Config;
pub use folder::{Component, ModelFolder};
pub use labels::Labels;
pub use png::Rgb8;
pub use single_file::Prediction;
pub use tokenizer::{Encoded, Tokenizer};
pub use weights::{Checkpoint, Entry, Order, StoredType};

#[cfg(test)]
pub(crate) mod scratch;
