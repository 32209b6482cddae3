//! `ldm` samples from latent diffusion models: the autoencoders and the conditioned UNet of Rombach et al. 2022 and the
//! Stable Diffusion family, on a CPU or through hand-written CUDA kernels.
//!
//! A tour, from the bottom: [`tensor`] holds shapes and host memory; [`ops`] are the rooms, one file per operation;
//! [`graph`] records them, fuses and plans; [`exec`] runs a planned graph on a [`backend`]; [`nn`] and [`mod@models`] build
//! graphs from checkpoints that [`io`] reads; [`mod@samplers`] are the solvers; [`diffusion`] joins model and sampler;
//! [`pipeline`] goes from a prompt to a picture; [`presets`] are configurations that need no checkpoint; [`data`] is what
//! models are trained on and judged by; [`train`] makes new weights.
//!
//! Letters in all comments: B batch, C channels, O output channels, H W image, KH KW window, G groups, T S query and key
//! tokens, N heads, D head size, E width of an embedding, V codebook or vocabulary. Activations are (B,H,W,C), weights
//! (O,KH,KW,I).

pub mod backend;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod diffusion;
pub mod error;
pub mod exec;
pub mod graph;
pub mod io;
pub mod kernels;
pub mod models;
pub mod nn;
pub mod ops;
pub mod pipeline;
pub mod presets;
pub mod rng;
pub mod samplers;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
