//! Files: checkpoints, their configurations, tokenizers, pictures.
//!
//! Everything that comes from outside is checked here, once, so that the rest of the engine may trust it.
//! A file that is damaged, of another kind, or newer than the engine is an error that names the file and what to do.

pub mod atomic;
pub mod chart;
// No checkpoint without a vocabulary is read yet.
#[cfg_attr(not(test), expect(dead_code))]
pub(crate) mod clip_vocabulary;
pub mod config;
mod convert;
pub mod events;
pub mod folder;
mod header;
pub mod labels;
pub mod mmap;
pub mod picture;
pub mod png;
// Nothing but tests reads from memory yet.
#[cfg_attr(not(test), expect(dead_code))]
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
pub use tokenizer::{Encoded, Tokenizer};
pub use weights::{Checkpoint, Entry, Order, StoredType};

#[cfg(test)]
pub(crate) mod scratch;
