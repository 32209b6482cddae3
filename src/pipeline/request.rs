//! What a caller asks for, hears meanwhile, and gets.

use crate::error::Result;
use crate::samplers::Choice;

/// A request for pictures. Fields are as the flags of `ldm sample`.
#[derive(Clone, Debug)]
pub struct Request {
    /// What the pictures show.
    pub prompt: String,
    /// A class by name or number, for models that draw such in place of texts.
    pub class: Option<String>,
    /// What each picture of the batch shows, in place of `prompt` or `class`; empty where all show the same.
    pub prompts: Vec<String>,
    /// What they do not show.
    pub negative: String,
    /// Pixels; by default what the model was made for.
    pub width: Option<usize>,
    /// Pixels; by default what the model was made for.
    pub height: Option<usize>,
    /// Steps of the sampler.
    pub steps: usize,
    /// Sampler; by default that of the checkpoint.
    pub method: Option<Choice>,
    /// Guidance scale; 1 is none.
    pub cfg_scale: f64,
    /// Seed of the first picture; picture i has seed + i.
    pub seed: u64,
    /// Pictures, which go through the UNet together.
    pub batch: usize,
    /// Last layers of the text encoder that are left out.
    pub clip_skip: usize,
    /// Share of fresh noise in DDIM's steps.
    pub eta: f64,
    /// A picture to start from (img2img), to draw anew in part (inpainting, with `mask`) or to enlarge (super-resolution).
    pub init: Option<Init>,
    /// Where the initial picture is drawn anew.
    pub mask: Option<Mask>,
    /// Take pictures through the autoencoder in tiles that overlap: less memory for large ones, not quite the same
    /// picture. Never done unasked.
    pub vae_tiling: bool,
    /// Side of a tile in latents; by default that of the pictures that the autoencoder was made for.
    pub vae_tile_size: Option<usize>,
}

/// A picture that a request begins with.
#[derive(Clone, PartialEq, Debug)]
pub struct Init {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Rows of RGB bytes.
    pub rgb: Vec<u8>,
    /// How much of it is given up, 0 to 1: this share of the steps runs. With a mask, 1 begins with noise alone where less
    /// begins with what is left of the picture. Super-resolution always begins with noise and does not look at it.
    pub strength: f64,
}

/// Where a picture is drawn anew (inpainting).
#[derive(Clone, PartialEq, Debug)]
pub struct Mask {
    /// Pixels, as the initial picture.
    pub width: usize,
    /// Pixels, as the initial picture.
    pub height: usize,
    /// Rows of bytes, one for a pixel: drawn anew from 128 on, which is white.
    pub gray: Vec<u8>,
    /// Elsewhere the result has the initial picture's bytes. Otherwise all of it comes out of the autoencoder, as diffusers
    /// has it.
    pub composite: bool,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            prompt: String::new(),
            class: None,
            prompts: vec![],
            negative: String::new(),
            width: None,
            height: None,
            steps: 30,
            method: None,
            cfg_scale: 7.5,
            seed: 0,
            batch: 1,
            clip_skip: 0,
            eta: 0.0,
            init: None,
            mask: None,
            vae_tiling: false,
            vae_tile_size: None,
        }
    }
}

/// A finished picture.
#[derive(Clone, PartialEq, Debug)]
pub struct Picture {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Rows of RGB bytes.
    pub rgb: Vec<u8>,
    /// The seed that makes it again, alone or in a batch.
    pub seed: u64,
}

/// What a caller hears while pictures are made. Every method may stop the run with [`crate::Error::Cancelled`].
pub trait Observer {
    /// A part of the work begins: `text`, `encoding` (of an initial picture), `sampling`, `decoding`; `loading` before
    /// each of them where its weights are read only now.
    ///
    /// # Errors
    /// Stops the run.
    fn stage(&mut self, _name: &str) -> Result<()> {
        Ok(())
    }
    /// Evaluation `done` of `of` is finished; or tile, where the autoencoder takes the picture in several.
    ///
    /// # Errors
    /// Stops the run.
    fn step(&mut self, _done: usize, _of: usize) -> Result<()> {
        Ok(())
    }
    /// Something that the user should know and that stops nothing.
    fn warning(&mut self, _what: &str) {}
}

impl Observer for () {}
