//! A model from a folder of diffusers to one file in the original code's names, and back; `ldm convert`.

use super::blueprint::scheduler;
use crate::error::{Error, Result};
use crate::io::compvis::{Names, Theirs};
use crate::io::single_file::{self, NOTE};
use crate::io::texts::Texts;
use crate::io::weights::{self, Piece};
use crate::io::{Checkpoint, Config, Entry, ModelFolder, Prediction, StoredType, atomic};
use crate::models::{AnyModel, Inventory, Source};
use crate::samplers::{Output, ScheduleConfig};
use crate::tensor::DType;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The small files of a component, as diffusers and transformers call them.
const SMALL: [&str; 9] = [
    "config.json",
    "scheduler_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// What a conversion wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Converted {
    /// Tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Parts of the pipeline that are not in it, with their classes.
    pub left_out: Vec<(String, String)>,
}

/// Writes the model in `from` to `to`: to one file, if that is called `….safetensors`, else to a folder of diffusers. `from` is either
/// too, or an autoencoder alone (a folder with `config.json`, or its file). Without a type, tensors stay as they are stored.
/// `prediction` is for files that do not say what their UNet predicts.
///
/// The file has the names of the original code (CompVis), and in its notes the small files of the folder, so that nothing is lost. It is
/// written to a temporary name; so is the folder.
///
/// # Errors
/// When a part is not what its configuration says, or cannot be expressed; when a folder that is not empty is in the way.
pub fn convert(
    from: &Path,
    to: &Path,
    dtype: Option<DType>,
    prediction: Option<Prediction>,
) -> Result<Converted> {
    let model = Model::read(from, prediction)?;
    let left_out = model.left_out.clone();
    let (tensors, bytes) = match to.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
        true => model.to_file(to, dtype)?,
        false => model.to_folder(to, dtype)?,
    };
    Ok(Converted { tensors, bytes, left_out })
}

/// One part with weights.
struct Part {
    /// Its folder; empty for an autoencoder alone.
    name: String,
    class: String,
    config: Config,
    weights: Checkpoint,
}

impl Part {
    /// A part whose tensors are those that its configuration asks for.
    fn new(name: &str, class: &str, config: Config, open: impl Fn() -> Result<Checkpoint>) -> Result<Part> {
        let Some(model) = AnyModel::read(class, &config)? else {
            return Err(config.error("_class_name", "a class that the engine knows"));
        };
        Source::new(open()?, &Inventory::of(&model.inventory(DType::F32)?))?;
        Ok(Part { name: name.into(), class: class.into(), config, weights: open()? })
    }

    /// A tensor as it will be written.
    fn entry(&self, name: &str, dtype: Option<DType>) -> Result<Entry> {
        let missing = || Error::invalid(format!("tensor `{name}` is not there"));
        let entry = self.weights.entry(name).cloned().ok_or_else(missing)?;
        Ok(match dtype.filter(|_| !self.weights.is_integer(name)) {
            Some(dtype) => Entry { dtype: weights::stored(dtype), ..entry },
            None => entry,
        })
    }

    fn bytes(&self, name: &str, dtype: Option<DType>) -> Result<Cow<'_, [u8]>> {
        match dtype.filter(|_| !self.weights.is_integer(name)) {
            Some(dtype) => Ok(Cow::Owned(self.weights.read(name, dtype)?.bytes().to_vec())),
            None => self.weights.bytes(name).map(|(_, bytes)| bytes),
        }
    }

    /// The file's tensors: each is one of the part's, or several that lie in turns of rows.
    fn pieces<'a>(&'a self, dtype: Option<DType>, alone: bool) -> Result<Vec<Piece<'a>>> {
        let names = match self.class == "CLIPTextModel" && self.config.opt_str("hidden_act")? == Some("gelu")
        {
            // Stable Diffusion 2's, by which other tools know that version.
            true => Names::open_clip(&self.config)?,
            false => Names::of(&self.class, &self.config, alone)?,
        };
        let mut all: BTreeMap<String, Vec<(Theirs, String)>> = BTreeMap::new();
        for ours in self.weights.names() {
            let Some(theirs) = names.theirs(ours) else {
                return Err(self.wrong(
                    ours,
                    "a tensor that a single file has a place for",
                    "no such".into(),
                ));
            };
            all.entry(theirs.name.clone()).or_default().push((theirs, ours.into()));
        }
        all.into_values().map(|together| self.piece(together, dtype)).collect()
    }

    /// One tensor of the file from those that lie in it.
    fn piece<'a>(&'a self, mut together: Vec<(Theirs, String)>, dtype: Option<DType>) -> Result<Piece<'a>> {
        together.sort_by_key(|(theirs, _)| theirs.form.rows.map(|r| r.part));
        let entries = together.iter().map(|(_, ours)| self.entry(ours, dtype));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let (first, (theirs, ours)) = (&entries[0], &together[0]);
        let entry = Entry { dtype: first.dtype, shape: theirs.shape(&first.shape) };
        let name = theirs.name.clone();
        let Some(rows) = theirs.form.rows else {
            let ours = ours.clone();
            return Ok(Piece { name, entry, bytes: Box::new(move || self.bytes(&ours, dtype)) });
        };
        let count = first.shape.first().copied().unwrap_or(0);
        if together.len() != rows.of || entries.iter().any(|e| e != first) || count % rows.head.max(1) != 0 {
            let want = format!("{} of one type and shape, in heads of {}", rows.of, rows.head);
            return Err(self.wrong(ours, &want, format!("{}, the first {first:?}", entries.len())));
        }
        let run = first.bytes().checked_div(count).unwrap_or(0) * rows.head;
        let bytes = move || -> Result<Cow<'a, [u8]>> {
            let parts = together.iter().map(|(_, ours)| self.bytes(ours, dtype));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let mut whole = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
            for turn in 0..count / rows.head.max(1) {
                parts.iter().for_each(|part| whole.extend_from_slice(&part[turn * run..][..run]));
            }
            Ok(Cow::Owned(whole))
        };
        Ok(Piece { name, entry, bytes: Box::new(bytes) })
    }

    fn wrong(&self, name: &str, want: &str, got: String) -> Error {
        Error::Tensor { file: self.weights.file(name).into(), name: name.into(), want: want.into(), got }
    }
}

/// A model that has been read, but for its values.
struct Model {
    parts: Vec<Part>,
    /// Small files by path.
    texts: BTreeMap<String, String>,
    /// The schedule, of a whole model.
    schedule: Option<ScheduleConfig>,
    left_out: Vec<(String, String)>,
}

impl Model {
    fn read(from: &Path, prediction: Option<Prediction>) -> Result<Model> {
        let file = from.is_file();
        let alone = match file {
            true => single_file::is_autoencoder(&Checkpoint::open(from)?),
            false => from.join("config.json").is_file() && !from.join("model_index.json").is_file(),
        };
        if alone {
            let name = "config.json";
            let (texts, open): (Texts, fn(&Path) -> Result<Checkpoint>) = match file {
                true => {
                    let held = Arc::new(single_file::texts(from, None)?);
                    (Texts::held(from, held), single_file::autoencoder_weights)
                }
                false => (Texts::folder(from), |from| Checkpoint::open(from)),
            };
            let config = texts.config(name)?;
            let class = config.one_of("_class_name", &["AutoencoderKL", "VQModel"], "AutoencoderKL")?;
            let part = Part::new("", class, config.clone(), || open(from))?;
            let texts = BTreeMap::from([(name.to_string(), texts.text(name)?)]);
            return Ok(Model { parts: vec![part], texts, schedule: None, left_out: vec![] });
        }
        let folder = ModelFolder::open_as(from, prediction)?;
        let (mut parts, mut left_out) = (vec![], vec![]);
        let mut texts = match folder.is_single_file() {
            true => single_file::texts(from, prediction)?,
            false => BTreeMap::new(),
        };
        for c in folder.components() {
            let known = crate::models::CLASSES.iter().any(|classes| classes.contains(&&*c.class));
            let small = ["scheduler", "tokenizer"].contains(&&*c.name);
            if !known && !small {
                left_out.push((c.name.clone(), c.class.clone()));
                continue;
            }
            if known {
                parts.push(Part::new(&c.name, &c.class, folder.config(&c.name)?, || {
                    folder.checkpoint(&c.name)
                })?);
            }
            let own = folder.texts(&c.name)?;
            for name in SMALL.iter().filter(|name| own.has(name)) {
                texts.insert(format!("{}/{name}", c.name), own.text(name)?);
            }
        }
        let mut index = json!({});
        for key in folder.index().keys() {
            let gone = left_out.iter().any(|(name, _)| name == key);
            index[key] = if gone { json!([null, null]) } else { folder.index().get(key).cloned().into() };
        }
        texts.insert("model_index.json".into(), pretty(&index));
        Ok(Model { parts, texts, schedule: Some(scheduler(&folder)?.1), left_out })
    }

    fn to_file(&self, to: &Path, dtype: Option<DType>) -> Result<(usize, usize)> {
        let alone = self.schedule.is_none();
        let mut pieces = vec![];
        for part in &self.parts {
            pieces.extend(part.pieces(dtype, alone)?);
        }
        if let Some(schedule) = &self.schedule {
            pieces.extend(buffers(schedule)?);
        }
        if let (false, Some(vae)) = (alone, self.parts.iter().find(|p| ["vae", "vqvae"].contains(&&*p.name)))
        {
            let scale = vae.config.f64_or("scaling_factor", 0.18215)? as f32;
            pieces.push(values("scale_factor", vec![], vec![scale]));
        }
        let count = (pieces.len(), pieces.iter().map(|p| p.entry.bytes()).sum());
        let mut notes: HashMap<String, String> = HashMap::from([("format".into(), "pt".into())]);
        notes.extend(self.texts.iter().map(|(name, text)| (format!("{NOTE}{name}"), text.clone())));
        notes.extend(self.model_spec(to)?);
        weights::write(to, pieces, Some(notes))?;
        Ok(count)
    }

    /// What tools for many models ask a file: <https://github.com/Stability-AI/ModelSpec>.
    fn model_spec(&self, to: &Path) -> Result<Vec<(String, String)>> {
        let title = to.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let unet = self.parts.iter().find(|p| p.name == "unet");
        let context = unet.map(|p| p.config.opt_usize("cross_attention_dim")).transpose()?.flatten();
        let clip = self.parts.iter().any(|p| p.class == "CLIPTextModel");
        let v = self.schedule.as_ref().is_some_and(|s| s.output == Output::V);
        let kind = match (context, clip, v) {
            (Some(768), true, _) => "stable-diffusion-v1",
            (Some(1024), true, true) => "stable-diffusion-v2-768-v",
            (Some(1024), true, false) => "stable-diffusion-v2-512",
            _ => "latent-diffusion",
        };
        let output = self.schedule.as_ref().map(|s| match s.output {
            Output::Epsilon => "epsilon",
            Output::V => "v",
            Output::Sample => "sample",
        });
        let all = [
            ("sai_model_spec", Some("1.0.0")),
            ("architecture", Some(kind)),
            ("implementation", Some("https://github.com/CompVis/latent-diffusion")),
            ("title", Some(&*title)),
            ("prediction_type", output),
        ];
        let said = all.into_iter().filter_map(|(key, v)| Some((format!("modelspec.{key}"), v?.to_string())));
        Ok(said.collect())
    }

    fn to_folder(&self, to: &Path, dtype: Option<DType>) -> Result<(usize, usize)> {
        let cannot = |path: &Path, e| Error::file(path, format!("cannot be written: {e}"));
        if to.is_file() || fs::read_dir(to).is_ok_and(|mut all| all.next().is_some()) {
            let why = "is there already: want a new folder, or a file that ends in .safetensors";
            return Err(Error::invalid(format!("{}: {why}", to.display())));
        }
        let name =
            to.file_name().ok_or_else(|| Error::invalid(format!("{}: names no folder", to.display())))?;
        let begun = to.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&begun).map_err(|e| cannot(to, e))?;
        let written = self.fill(&begun, dtype);
        let moved = written.and_then(|count| {
            fs::rename(&begun, to).map_err(|e| cannot(to, e))?;
            Ok(count)
        });
        if moved.is_err() {
            let _ = fs::remove_dir_all(&begun);
        }
        moved
    }

    fn fill(&self, folder: &Path, dtype: Option<DType>) -> Result<(usize, usize)> {
        let make = |path: &Path| {
            fs::create_dir_all(path).map_err(|e| Error::file(path, format!("cannot be made: {e}")))
        };
        let (mut tensors, mut bytes) = (0, 0);
        for part in &self.parts {
            let pieces = part.weights.names().map(|name| {
                let entry = part.entry(name, dtype)?;
                Ok(Piece { name: name.into(), entry, bytes: Box::new(move || part.bytes(name, dtype)) })
            });
            let pieces = pieces.collect::<Result<Vec<_>>>()?;
            (tensors, bytes) =
                (tensors + pieces.len(), bytes + pieces.iter().map(|p| p.entry.bytes()).sum::<usize>());
            let stem = match &*part.class {
                "CLIPTextModel" | "LDMBertModel" => "model",
                _ => "diffusion_pytorch_model",
            };
            let at = folder.join(&part.name);
            make(&at)?;
            let notes = HashMap::from([("format".into(), "pt".into())]);
            weights::write(at.join(format!("{stem}.safetensors")), pieces, Some(notes))?;
        }
        for (name, text) in &self.texts {
            let path = folder.join(name);
            make(path.parent().unwrap_or(folder))?;
            atomic::write(&path, text.as_bytes())?;
        }
        Ok((tensors, bytes))
    }
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

fn values<'a>(name: &str, shape: Vec<usize>, values: Vec<f32>) -> Piece<'a> {
    let bytes = move || Ok(Cow::Owned(bytemuck::cast_slice(&values).to_vec()));
    Piece { name: name.into(), entry: Entry { dtype: StoredType::F32, shape }, bytes: Box::new(bytes) }
}

/// What the original code keeps of the noise schedule beside the weights (Ho et al. 2020, equations 4 and 7), (T) f32 each.
fn buffers<'a>(schedule: &ScheduleConfig) -> Result<Vec<Piece<'a>>> {
    let betas = schedule.train_betas_f64()?;
    let bars: Vec<f64> = betas
        .iter()
        .scan(1.0, |bar, beta| {
            *bar *= 1.0 - beta;
            Some(*bar)
        })
        .collect();
    let before = |t: usize| if t == 0 { 1.0 } else { bars[t - 1] };
    let variance = |t: usize| betas[t] * (1.0 - before(t)) / (1.0 - bars[t]);
    type Row<'a> = (&'a str, &'a dyn Fn(usize) -> f64);
    let rows: [Row; 12] = [
        ("betas", &|t| betas[t]),
        ("alphas_cumprod", &|t| bars[t]),
        ("alphas_cumprod_prev", &before),
        ("sqrt_alphas_cumprod", &|t| bars[t].sqrt()),
        ("sqrt_one_minus_alphas_cumprod", &|t| (1.0 - bars[t]).sqrt()),
        ("log_one_minus_alphas_cumprod", &|t| (1.0 - bars[t]).ln()),
        ("sqrt_recip_alphas_cumprod", &|t| (1.0 / bars[t]).sqrt()),
        ("sqrt_recipm1_alphas_cumprod", &|t| (1.0 / bars[t] - 1.0).sqrt()),
        ("posterior_variance", &variance),
        ("posterior_log_variance_clipped", &|t| variance(t).max(1e-20).ln()),
        ("posterior_mean_coef1", &|t| betas[t] * before(t).sqrt() / (1.0 - bars[t])),
        ("posterior_mean_coef2", &|t| (1.0 - before(t)) * (1.0 - betas[t]).sqrt() / (1.0 - bars[t])),
    ];
    let n = betas.len();
    Ok(rows.map(|(name, at)| values(name, vec![n], (0..n).map(|t| at(t) as f32).collect())).into())
}

#[cfg(test)]
mod tests;
