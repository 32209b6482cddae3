//! Model configurations that are built in: what a diffusers folder says about its parts, without weights.
//!
//! A preset is one JSON file here and one line in the list. Each section is the `config.json` of a part, with its class
//! under `_class_name`; a preset may lack parts. Numbers follow Rombach et al. 2022 (tables 12 to 15 and the published
//! configurations) and the Stable Diffusion checkpoints.

use crate::error::{Error, Result};
use crate::io::Config;
use serde_json::Value;
use std::path::PathBuf;

/// A built-in configuration.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What `--preset` calls it.
    pub name: &'static str,
    text: &'static str,
}

macro_rules! presets {
    ($($name:literal,)+) => {
        /// All presets, in the order in which they are listed to users.
        pub const PRESETS: &[Preset] =
            &[$(Preset { name: $name, text: include_str!(concat!($name, ".json")) },)+];
    };
}

presets! {
    "sd15",
    "sd15-inpainting",
    "sd21-base",
    "sd21",
    "txt2img-1p4B-kl8",
    "text2img256-vq4",
    "cin256-v1-vq8",
    "cin256-v2-vq4",
    "layout2img-openimages256-vq4",
    "kl-f4",
    "kl-f8",
    "kl-f16",
    "kl-f32",
    "vq-f4",
    "vq-f4-noattn",
    "vq-f8",
    "vq-f8-n256",
    "vq-f16",
}

impl Preset {
    /// The preset of this name, whatever its case.
    ///
    /// # Errors
    /// [`Error::Invalid`] with all names.
    pub fn find(name: &str) -> Result<&'static Preset> {
        PRESETS.iter().find(|p| p.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
            let all = PRESETS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
            Error::invalid(format!("preset: want one of {all}; got `{name}`"))
        })
    }

    /// What errors call the place that a value stands in.
    pub fn file(&self) -> PathBuf {
        format!("preset {}", self.name).into()
    }

    /// The whole configuration.
    ///
    /// # Errors
    /// None with the presets that are built in.
    pub fn config(&self) -> Result<Config> {
        let value = serde_json::from_str(self.text).map_err(|e| Error::file(self.file(), e))?;
        Config::from_value(self.file(), value)
    }

    /// What the preset is, in one line.
    ///
    /// # Errors
    /// None with the presets that are built in.
    pub fn about(&self) -> Result<String> {
        Ok(self.config()?.str("about")?.to_string())
    }

    /// Class and configuration of a part (`text_encoder`, `unet`, `vae`); `None` where the preset has no such part.
    ///
    /// # Errors
    /// None with the presets that are built in.
    pub fn part(&self, name: &str) -> Result<Option<(String, Config)>> {
        let Some(section) = self.config()?.section(name)? else { return Ok(None) };
        Ok(Some((section.str("_class_name")?.to_string(), section)))
    }

    /// Class and configuration of the scheduler, as JSON.
    ///
    /// # Errors
    /// None with the presets that are built in.
    pub fn scheduler(&self) -> Result<Option<(String, Value)>> {
        let config = self.config()?;
        let Some(section) = config.section("scheduler")? else { return Ok(None) };
        let class = section.str("_class_name")?.to_string();
        Ok(config.get("scheduler").cloned().map(|value| (class, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_a_line_about_it_and_known_sections() {
        for p in PRESETS {
            assert!(!p.about().unwrap().is_empty(), "{}", p.name);
            let known = ["about", "text_encoder", "unet", "vae", "scheduler"];
            p.config().unwrap().only(&known).unwrap();
            for part in ["text_encoder", "unet", "vae"] {
                p.part(part).unwrap();
            }
            p.scheduler().unwrap();
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        assert_eq!(Preset::find("SD15").unwrap().name, "sd15");
        let e = Preset::find("sd16").unwrap_err().to_string();
        assert!(e.contains("sd15, ") && e.contains("vq-f4") && e.contains("`sd16`"), "{e}");
    }
}
