//! A pipeline as diffusers stores it: `model_index.json`, and one folder for each component. Or all of it in one file.

use super::compvis::{self, Names};
use super::config::Config;
use super::single_file::{self, Prediction};
use super::texts::Texts;
use super::tokenizer::Tokenizer;
use super::weights::Checkpoint;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One part of a pipeline.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Component {
    /// Its name, which is that of its folder: `unet`, `vae`, `text_encoder`, …
    pub name: String,
    /// The Python package that its class comes from: `diffusers`, `transformers`, …
    pub library: String,
    /// Its class: `UNet2DConditionModel`, `AutoencoderKL`, …
    pub class: String,
    /// Its folder; of a model in one file, that file.
    pub path: PathBuf,
}

/// A model: a folder, or a file with all of it. Opening it reads `model_index.json` alone, or the file's header.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    path: PathBuf,
    texts: Texts,
    index: Config,
    class: String,
    components: Vec<Component>,
}

impl ModelFolder {
    /// Reads `model_index.json`, or the header of a single file. Components that are null there do not count.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the path is neither, with what it is instead; [`Error::File`] when the index or the file
    /// cannot be read, [`Error::Config`] when it is not understood.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFolder> {
        ModelFolder::open_as(path, None)
    }

    /// [`ModelFolder::open`]; where a single file does not say what its UNet predicts, it is this.
    ///
    /// # Errors
    /// As there.
    pub fn open_as(path: impl AsRef<Path>, prediction: Option<Prediction>) -> Result<ModelFolder> {
        let path = path.as_ref();
        let single = path.is_file();
        let texts = match single {
            true => Texts::held(path, Arc::new(single_file::texts(path, prediction)?)),
            false => Texts::folder(path),
        };
        if !single && prediction.is_some() && texts.has("model_index.json") {
            return Err(single_file::said_already(path));
        }
        if !texts.has("model_index.json") {
            let what = match single && texts.has("config.json") {
                true => format!("{WANT}; got a file with an autoencoder alone"),
                false => what_it_is(path),
            };
            return Err(Error::invalid(format!("{}: {what}", path.display())));
        }
        let index = texts.config("model_index.json")?;
        let class = index.str("_class_name")?.to_owned();
        let mut components = Vec::new();
        for name in index.keys().filter(|k| !k.starts_with('_')) {
            // Options of the pipeline, such as `requires_safety_checker`, stand among the components.
            let Some(pair) = index.get(name).and_then(|v| v.as_array()) else { continue };
            match (pair.len(), pair.iter().map(|v| v.as_str()).collect::<Option<Vec<_>>>()) {
                (2, Some(words)) => components.push(Component {
                    name: name.into(),
                    library: words[0].into(),
                    class: words[1].into(),
                    path: if single { path.into() } else { path.join(name) },
                }),
                (2, None) if pair.iter().any(|v| v.is_null()) => {}
                _ => return Err(index.error(name, "[library, class], or [null, null]")),
            }
        }
        Ok(ModelFolder { path: path.into(), texts, index, class, components })
    }

    /// The folder, or the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pipeline's class: `StableDiffusionPipeline`, `LDMPipeline`, …
    pub fn class(&self) -> &str {
        &self.class
    }

    /// The parts that are there, in the order of the index.
    pub fn components(&self) -> &[Component] {
        &self.components
    }

    /// All of `model_index.json`, with the options of the pipeline.
    pub fn index(&self) -> &Config {
        &self.index
    }

    /// Whether the pipeline has a component.
    pub fn has(&self, name: &str) -> bool {
        self.components.iter().any(|c| c.name == name)
    }

    /// Whether all of it is in one file.
    pub fn is_single_file(&self) -> bool {
        self.path.is_file()
    }

    /// A component, whose folder exists.
    ///
    /// # Errors
    /// [`Error::Config`] when the index does not list it; [`Error::File`] when its folder is missing.
    pub fn component(&self, name: &str) -> Result<&Component> {
        let Some(found) = self.components.iter().find(|c| c.name == name) else {
            let all: Vec<&str> = self.components.iter().map(|c| c.name.as_str()).collect();
            let want = format!("this component (there are: {})", all.join(", "));
            return Err(self.index.error(name, want));
        };
        if found.path.exists() {
            return Ok(found);
        }
        let class = &found.class;
        Err(Error::file(
            &found.path,
            format!("not found; model_index.json lists it as {class}; download the folder"),
        ))
    }

    /// The small files of a component.
    ///
    /// # Errors
    /// As [`ModelFolder::component`].
    pub(crate) fn texts(&self, name: &str) -> Result<Texts> {
        self.component(name).map(|c| self.texts.inner(&c.name))
    }

    /// The running product of 1 - beta over the training timesteps, where a single file has it beside the weights.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Checkpoint::read_f32`].
    pub fn alphas_cumprod(&self) -> Result<Option<Vec<f32>>> {
        let name = "alphas_cumprod";
        let file = if self.is_single_file() { Some(Checkpoint::open(&self.path)?) } else { None };
        file.filter(|file| file.entry(name).is_some()).map(|file| file.read_f32(name)).transpose()
    }

    /// A component's `config.json`.
    ///
    /// # Errors
    /// As [`ModelFolder::component`] and [`Config::read`].
    pub fn config(&self, name: &str) -> Result<Config> {
        self.texts(name)?.config("config.json")
    }

    /// A component's weights, by diffusers' names.
    ///
    /// # Errors
    /// As [`ModelFolder::component`] and [`Checkpoint::open`].
    pub fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        let component = self.component(name)?;
        if !self.is_single_file() {
            return Checkpoint::open(&component.path);
        }
        let (file, config) = (Checkpoint::open(&self.path)?, self.config(name)?);
        let open_clip = component.class == "CLIPTextModel"
            && file.names().any(|tensor| tensor.starts_with(compvis::OPEN_CLIP));
        let names = match open_clip {
            true => Names::open_clip(&config)?,
            false => Names::of(&component.class, &config, false)?,
        };
        file.renamed(names)
    }

    /// The tokenizer of a component.
    ///
    /// # Errors
    /// As [`ModelFolder::component`] and [`Tokenizer::open`].
    pub fn tokenizer(&self, name: &str) -> Result<Tokenizer> {
        Tokenizer::read(&self.texts(name)?)
    }
}

const WANT: &str =
    "want a folder with model_index.json, as diffusers saves it, or one file with a whole model";

/// Why a path is not a model folder, and what to give instead.
fn what_it_is(path: &Path) -> String {
    let has = |name: &str| path.join(name).is_file();
    let want = WANT;
    if path.is_file() {
        return format!("{want}; got a file of ldm's without model_index.json in its notes");
    }
    if !path.is_dir() {
        return format!(
            "{want}; there is nothing at this path: check its spelling, or download the model first"
        );
    }
    if has("config.json") || has("scheduler_config.json") {
        return format!("{want}; got the folder of one component: give the folder above it");
    }
    if path.join("snapshots").is_dir() {
        return format!("{want}; got an entry of the hub cache: give one of the folders in its snapshots/");
    }
    if path.join("export").join("model_index.json").is_file() {
        return format!("{want}; got a training run: give {}", path.join("export").display());
    }
    format!("{want}; got a folder without it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    const INDEX: &str = r#"{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.37.1",
        "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [null, null], "feature_extractor": null,
        "requires_safety_checker": false, "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}"#;

    fn text<T: std::fmt::Debug>(r: Result<T>) -> String {
        r.unwrap_err().to_string()
    }

    #[test]
    fn components_are_listed_and_nulls_skipped() {
        let dir = Scratch::new("folder");
        dir.file("model_index.json", INDEX);
        dir.file("unet/config.json", r#"{"sample_size": 64}"#);
        dir.file("scheduler/scheduler_config.json", r#"{"_class_name": "DDIMScheduler"}"#);
        let m = ModelFolder::open(dir.path()).unwrap();
        assert_eq!(m.class(), "StableDiffusionPipeline");
        assert_eq!(
            m.components().iter().map(|c| &c.name[..]).collect::<Vec<_>>(),
            ["unet", "vae", "scheduler"]
        );
        assert_eq!(m.component("unet").unwrap().class, "UNet2DConditionModel");
        assert_eq!(m.config("unet").unwrap().usize("sample_size").unwrap(), 64);
        assert!(m.has("vae") && !m.has("safety_checker"));
        assert!(!m.index().bool("requires_safety_checker").unwrap());

        assert!(
            text(m.component("vae")).contains("vae: not found; model_index.json lists it as AutoencoderKL")
        );
        assert!(
            text(m.config("text_encoder"))
                .contains("`text_encoder`: want this component (there are: unet, vae")
        );
        assert!(text(m.checkpoint("unet")).contains("holds no weights"));
        dir.file("vae/x", "");
        assert!(text(m.config("vae")).ends_with("vae/config.json: not found"));
    }

    #[test]
    fn what_is_not_a_model_folder_is_explained() {
        let dir = Scratch::new("folder");
        let broken = dir.file("model.safetensors", "x");
        assert!(text(ModelFolder::open(broken)).contains("not a whole safetensors file"));
        dir.file("unet/config.json", "{}");
        dir.file("cache/snapshots/abc/model_index.json", INDEX);
        for (path, say) in [
            (dir.path().join("none"), "nothing at this path"),
            (dir.path().join("unet"), "give the folder above it"),
            (dir.path().join("cache"), "snapshots/"),
            (dir.path().to_path_buf(), "got a folder without it"),
        ] {
            let e = text(ModelFolder::open(&path));
            assert!(e.contains(say) && e.contains(path.to_str().unwrap()), "{e}");
        }
        dir.file("model_index.json", r#"{"unet": ["a", "b"]}"#);
        assert!(text(ModelFolder::open(dir.path())).contains("`_class_name`"));
        dir.file("model_index.json", r#"{"_class_name": "X", "unet": ["a"]}"#);
        assert!(text(ModelFolder::open(dir.path())).contains("`unet`: want [library, class]"));
    }
}
