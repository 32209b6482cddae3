//! What a UNet is given beside the latents, as further channels of its input: Rombach et al. 2022, sections 4.4 and 4.5.

use super::{Blueprint, Request};
use crate::error::{Error, Result};

/// Channels of a picture.
pub(super) const RGB: usize = 3;

/// The channels that follow the latents in the UNet's input, in both halves of guidance and at every step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Beside {
    /// None.
    #[default]
    Nothing,
    /// Inpainting, as `StableDiffusionInpaintPipeline` has it: the mask, 1 where the picture is drawn anew, and the latents of
    /// the picture with gray there. 1 + Z channels.
    Mask,
    /// Super-resolution, as `LDMSuperResolutionPipeline` has it: a picture in −1…1 with a pixel for each latent. 3 channels.
    /// Latents are not scaled.
    Picture,
}

impl Beside {
    /// Number of channels, where latents have `z`.
    pub fn channels(self, z: usize) -> usize {
        match self {
            Beside::Nothing => 0,
            Beside::Mask => 1 + z,
            Beside::Picture => RGB,
        }
    }

    /// What the UNet of a pipeline of this class takes, where latents have `z` channels and its input has `channels`.
    ///
    /// # Errors
    /// What `channels` should be instead.
    pub(super) fn read(class: &str, z: usize, channels: usize) -> std::result::Result<Beside, String> {
        let all: &[Beside] = match class {
            "LDMSuperResolutionPipeline" => &[Beside::Picture],
            _ => &[Beside::Nothing, Beside::Mask],
        };
        all.iter().copied().find(|beside| z + beside.channels(z) == channels).ok_or_else(|| match all {
            [Beside::Picture] => format!("{}: latent_channels {z} and the {RGB} of a picture", z + RGB),
            _ => format!(
                "latent_channels {z}, or {} for inpainting (beside a mask and {z} of the masked picture)",
                2 * z + 1
            ),
        })
    }
}

/// Gray from here on is drawn anew: half of 255, as diffusers has it.
pub(super) const DRAWN: u8 = 128;

impl Blueprint {
    /// Checks that a request has the pictures that the model takes, whole and of one size.
    ///
    /// # Errors
    /// [`Error::Invalid`] that says what is missing, or too much.
    pub fn check_pictures(&self, r: &Request) -> Result<()> {
        let told = |what: &str| Err(Error::invalid(what));
        match (self.beside, &r.init, &r.mask) {
            (Beside::Mask, None, _) => told(
                "this model draws a part of a picture anew (inpainting): want the picture (-i FILE) and a mask of its size \
                 (--mask FILE), white where it is drawn anew",
            ),
            (Beside::Mask, Some(_), None) => told(
                "this model draws a part of a picture anew (inpainting): want a mask of the picture's size (--mask FILE), \
                 white where it is drawn anew",
            ),
            (Beside::Picture, None, _) => {
                told("this model enlarges a picture (super-resolution): want one (-i FILE)")
            }
            (Beside::Picture, Some(_), Some(_)) => {
                told("mask: this model enlarges a picture (super-resolution): want none")
            }
            (Beside::Nothing, None, Some(_)) => told("mask: want the picture that it is of (-i FILE)"),
            _ => Ok(()),
        }?;
        let bytes = |what: &str, width: usize, height: usize, each: usize, got: usize| match width
            .checked_mul(height)
            .and_then(|n| n.checked_mul(each))
            == Some(got)
            && got > 0
        {
            true => Ok(()),
            false => Err(Error::invalid(format!("{what}: want {width}x{height}x{each} bytes; got {got}"))),
        };
        if let Some(init) = &r.init {
            bytes("initial picture", init.width, init.height, RGB, init.rgb.len())?;
            if !(0.0..=1.0).contains(&init.strength) {
                return Err(Error::invalid(format!(
                    "strength: want a number from 0 to 1; got {}",
                    init.strength
                )));
            }
        }
        if let (Some(init), Some(mask)) = (&r.init, &r.mask) {
            if (mask.width, mask.height) != (init.width, init.height) {
                return Err(Error::invalid(format!(
                    "mask: want the picture's size {}x{}; got {}x{}",
                    init.width, init.height, mask.width, mask.height
                )));
            }
            bytes("mask", mask.width, mask.height, 1, mask.gray.len())?;
        }
        Ok(())
    }

    /// How many pixels a picture's result has for one of its own, on each axis.
    pub(super) fn growth(&self) -> usize {
        if self.beside == Beside::Picture { self.vae.codec().factor() } else { 1 }
    }

    /// Factor between the autoencoder's latents and the sampler's.
    pub(super) fn scale(&self) -> f64 {
        if self.beside == Beside::Picture { 1.0 } else { self.vae.codec().scaling_factor }
    }

    /// Whether what is known of the picture is put back after each step: inpainting by a model that is not made for it.
    pub(super) fn blends(&self, r: &Request) -> bool {
        self.beside == Beside::Nothing && r.mask.is_some()
    }

    /// Whether a request begins with noise alone, and not with what is left of a picture.
    pub(super) fn starts_from_noise(&self, r: &Request) -> bool {
        match &r.init {
            None => true,
            Some(_) if self.beside == Beside::Picture => true,
            Some(init) => r.mask.is_some() && init.strength >= 1.0,
        }
    }
}
