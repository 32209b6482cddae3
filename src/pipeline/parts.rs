//! The parts of a model, each by itself, from a folder or a preset: for measuring, and for models that are not whole.

use super::Vae;
use super::blueprint::{scheduler, vae_name};
use crate::error::{Error, Result};
use crate::exec::{Device, Weights};
use crate::io::{Config, ModelFolder};
use crate::models::{AnyModel, ClipText, Conditioner, Inventory, Model, UNet2D, UNet2DCondition};
use crate::presets::Preset;
use crate::samplers::ScheduleConfig;
use crate::tensor::DType;

/// What there is of a model. A part that is missing, or of a class that the engine does not run, is `None`.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// The text encoder, or the table of classes.
    pub text: Option<Conditioner>,
    /// The UNet; one without a condition has a context of width 0.
    pub unet: Option<UNet2DCondition>,
    /// The autoencoder.
    pub vae: Option<Vae>,
    /// Class of the scheduler, and the noise schedule.
    pub schedule: Option<(String, ScheduleConfig)>,
    /// Name and class of every part that is there, whether it is run or not.
    pub classes: Vec<(String, String)>,
}

impl Parts {
    /// The parts of a preset.
    ///
    /// # Errors
    /// None with the presets that are built in.
    pub fn preset(preset: &Preset) -> Result<Parts> {
        let mut parts = Parts::default();
        for name in ["text_encoder", "unet", "vae"] {
            if let Some((class, config)) = preset.part(name)? {
                parts.add(name, &class, &config)?;
            }
        }
        if let Some((class, value)) = preset.scheduler()? {
            parts.schedule = Some((class, ScheduleConfig::from_json(&value, &preset.file())?));
        }
        Ok(parts)
    }

    /// The parts of a diffusers folder.
    ///
    /// # Errors
    /// When the configuration of a class that the engine runs is not understood.
    pub fn read(folder: &ModelFolder) -> Result<Parts> {
        let mut parts = Parts::default();
        let names = ["text_encoder", "bert", "class_embedder", "unet", vae_name(folder), "scheduler"];
        for c in folder.components().iter().filter(|c| names.contains(&&*c.name)) {
            match (c.path.exists(), &*c.name) {
                // A part may be left out of a copy: the others can still be measured.
                (false, name) => {
                    parts.classes.push((name.into(), format!("{}, without its folder", c.class)))
                }
                (true, "scheduler") => parts.schedule = Some(scheduler(folder)?),
                (true, name) => parts.add(name, &c.class, &folder.config(name)?)?,
            }
        }
        Ok(parts)
    }

    fn add(&mut self, name: &str, class: &str, config: &Config) -> Result<()> {
        self.classes.push((name.into(), class.into()));
        match AnyModel::read(class, config)? {
            Some(AnyModel::ClipText(m)) => self.text = Some(Conditioner::Clip(m)),
            Some(AnyModel::LdmBert(m)) => self.text = Some(Conditioner::Bert(m)),
            Some(AnyModel::ClassEmbedder(m)) => self.text = Some(Conditioner::Class(m)),
            Some(AnyModel::UNet2DCondition(m)) => self.unet = Some(m),
            Some(AnyModel::UNet2D(m)) => self.unet = Some(m.into()),
            Some(AnyModel::AutoencoderKL(m)) => self.vae = Some(Vae::Kl(m)),
            Some(AnyModel::VQModel(m)) => self.vae = Some(Vae::Vq(m)),
            // No parts of a pipeline.
            Some(AnyModel::NLayerDiscriminator(_) | AnyModel::Lpips(_)) | None => {}
        }
        Ok(())
    }

    /// The text encoder, or what there is instead.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there is none that the engine runs.
    pub fn text(&self) -> Result<&Conditioner> {
        self.text.as_ref().ok_or_else(|| self.missing("text_encoder", ClipText::CLASSES))
    }

    /// The UNet, or what there is instead.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there is none that the engine runs.
    pub fn unet(&self) -> Result<&UNet2DCondition> {
        let classes = [UNet2DCondition::CLASSES, UNet2D::CLASSES].concat();
        self.unet.as_ref().ok_or_else(|| self.missing("unet", &classes))
    }

    /// The autoencoder, or what there is instead.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there is none that the engine runs.
    pub fn vae(&self) -> Result<&Vae> {
        self.vae.as_ref().ok_or_else(|| self.missing("vae", &["AutoencoderKL", "VQModel"]))
    }

    fn missing(&self, part: &str, want: &[&str]) -> Error {
        let there: Vec<String> = self.classes.iter().map(|(n, c)| format!("{n} ({c})")).collect();
        let there = if there.is_empty() { "nothing".into() } else { there.join(", ") };
        Error::invalid(format!("this model has no {part} of class {}; it has {there}", want.join(" or ")))
    }
}

impl Vae {
    /// The weights that encoder and decoder need.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn inventory(&self, dtype: DType) -> Result<Inventory> {
        Ok(Inventory::of(&match self {
            Vae::Kl(m) => m.inventory(dtype)?,
            Vae::Vq(m) => m.inventory(dtype)?,
        }))
    }
}

/// Weights of the right names, shapes and type with random contents, the same for the same seed: for measuring.
///
/// Matrices and convolutions are uniform with variance 1 / fan-in, scales of norms are 1, biases are within 0.01 of 0,
/// so that activations stay of order one. Filled by all threads.
///
/// # Errors
/// When the device has no room for them.
pub fn random_weights(inventory: &Inventory, device: &Device, seed: u64) -> Result<Weights> {
    let mut weights = Weights::new(device);
    for (name, spec, layout) in inventory.iter() {
        weights.insert_as(name, &super::random::tensor(name, spec, seed)?, layout)?;
    }
    Ok(weights)
}
