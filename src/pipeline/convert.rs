//! A model from a folder of diffusers to one file in the original code's names, and back; `ldm convert`.

use super::blueprint::scheduler;
use crate::error::{Error, Result};
use crate::io::compvis::{Names, Theirs};
use crate::io::single_file::{self, NOTE, SMALL, pretty};
use crate::io::texts::Texts;
use crate::io::weights::{self, Bytes, Piece};
use crate::io::{Checkpoint, Config, Entry, ModelFolder, Prediction, StoredType, atomic};
use crate::models::load::is_unused;
use crate::models::{AnyModel, Inventory, Source};
use crate::samplers::{Output, ScheduleConfig};
use crate::tensor::DType;
use serde_json::json;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a conversion wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Converted {
    /// Tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Parts of the pipeline that are not in it, with their classes.
    pub left_out: Vec<(String, String)>,
    /// Of a file: in what, beside names and shapes, its model is not one of the original code's. Tools that build those cannot run it.
    pub own: Vec<String>,
}

/// Writes the model in `from` to `to`: to one file, if that is called `….safetensors`, else to a folder of diffusers. `from` is either
/// too, or an autoencoder alone (a folder with `config.json`, or its file). Without a type, tensors stay as they are stored.
/// `prediction` is for files that do not say what their UNet predicts.
///
/// The file has the names of the original code (CompVis), and in its notes the small files of the folder, so that nothing is lost. It is
/// written to a temporary name and replaces what is there; so is the folder, which must be a new one or empty.
///
/// # Errors
/// When a part is not what its configuration says, or cannot be expressed; when a folder that is not empty is in the way.
pub fn convert(
    from: &Path,
    to: &Path,
    dtype: Option<DType>,
    prediction: Option<Prediction>,
) -> Result<Converted> {
    let ending = to.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    if ["ckpt", "pt", "pth", "bin", "gguf", "safetensor", "onnx"].contains(&&*ending) {
        let want = "want a name that ends in .safetensors, or that of a folder";
        return Err(Error::invalid(format!("{}: {want}; got .{ending}", to.display())));
    }
    let model = Model::read(from, prediction)?;
    let left_out = model.left_out.clone();
    if ending == "safetensors" {
        let (tensors, bytes) = model.to_file(to, dtype)?;
        return Ok(Converted { tensors, bytes, left_out, own: model.own()? });
    }
    let (tensors, bytes) = model.to_folder(to, dtype)?;
    Ok(Converted { tensors, bytes, left_out, own: vec![] })
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
    fn new(name: &str, class: &str, config: Config, weights: Checkpoint) -> Result<Part> {
        let Some(model) = AnyModel::read(class, &config)? else {
            return Err(config.error("_class_name", "a class that the engine knows"));
        };
        let weights = Source::new(weights, &Inventory::of(&model.inventory(DType::F32)?))?.into_checkpoint();
        Ok(Part { name: name.into(), class: class.into(), config, weights })
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

    fn bytes(&self, name: &str, dtype: Option<DType>) -> Result<Bytes<'_>> {
        match dtype.filter(|_| !self.weights.is_integer(name)) {
            Some(dtype) => Ok(Bytes::Tensor(self.weights.read(name, dtype)?)),
            None => self.weights.bytes(name).map(|(_, bytes)| Bytes::Stored(bytes)),
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
                if is_unused(ours) {
                    continue;
                }
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
        let all: Vec<String> = together.iter().map(|(_, ours)| ours.clone()).collect();
        let done = Box::new(move || all.iter().for_each(|ours| self.weights.release(ours)));
        let Some(rows) = theirs.form.rows else {
            let ours = ours.clone();
            return Ok(Piece { name, entry, bytes: Box::new(move || self.bytes(&ours, dtype)), done });
        };
        let count = first.shape.first().copied().unwrap_or(0);
        if together.len() != rows.of || entries.iter().any(|e| e != first) || count % rows.head.max(1) != 0 {
            let want = format!("{} of one type and shape, in heads of {}", rows.of, rows.head);
            return Err(self.wrong(ours, &want, format!("{}, the first {first:?}", entries.len())));
        }
        let run = first.bytes().checked_div(count).unwrap_or(0) * rows.head;
        let bytes = move || -> Result<Bytes<'a>> {
            let parts = together.iter().map(|(_, ours)| self.bytes(ours, dtype));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let parts: Vec<&[u8]> = parts.iter().map(Bytes::as_ref).collect();
            let mut whole = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
            for turn in 0..count / rows.head.max(1) {
                parts.iter().for_each(|part| whole.extend_from_slice(&part[turn * run..][..run]));
            }
            Ok(Bytes::Stored(Cow::Owned(whole)))
        };
        Ok(Piece { name, entry, bytes: Box::new(bytes), done })
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
        // A run is as good as what it exported.
        let places = ["", "export", "export/vae"].map(|inner| from.join(inner));
        let is_there = |p: &&PathBuf| ["model_index.json", "config.json"].iter().any(|f| p.join(f).is_file());
        let found = places.iter().find(is_there).filter(|_| from.is_dir());
        let (from, name) = (found.map_or(from, |p| p), "config.json");
        let alone = match from.is_file() {
            true => single_file::is_autoencoder(&Checkpoint::open(from)?),
            false => from.join(name).is_file() && !from.join("model_index.json").is_file(),
        };
        if alone {
            if prediction.is_some() {
                return Err(single_file::said_already(from));
            }
            let texts = match from.is_file() {
                true => Texts::held(from, Arc::new(single_file::texts(from, None)?)),
                false => Texts::folder(from),
            };
            let config = texts.config(name)?;
            let class = config.one_of("_class_name", &["AutoencoderKL", "VQModel"], "AutoencoderKL")?;
            let weights = match from.is_file() {
                true => single_file::autoencoder_weights(from),
                false => Checkpoint::open(from),
            };
            let part = Part::new("", class, config.clone(), weights?)?;
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
                let (config, weights) = (folder.config(&c.name)?, folder.checkpoint(&c.name)?);
                parts.push(Part::new(&c.name, &c.class, config, weights)?);
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
        let unet = self.parts.iter().find(|p| p.name == "unet").map(|p| &p.config);
        let clip = self.parts.iter().any(|p| p.class == "CLIPTextModel");
        let v = self.schedule.as_ref().is_some_and(|s| s.output == Output::V);
        let number = |key: &str| unet.and_then(|c| c.get(key)?.as_u64());
        let size = unet.and_then(|c| c.get("block_out_channels")).filter(|_| clip);
        let is_sd = size.is_some_and(|size| *size == json!([320, 640, 1280, 1280]));
        let kind = match (number("cross_attention_dim"), number("in_channels"), v) {
            _ if !is_sd => "latent-diffusion",
            (Some(768), Some(9), _) => "stable-diffusion-v1-inpainting",
            (Some(768), _, _) => "stable-diffusion-v1",
            (Some(1024), Some(9), _) => "stable-diffusion-v2-inpainting",
            (Some(1024), _, true) => "stable-diffusion-v2-768-v",
            (Some(1024), _, false) => "stable-diffusion-v2-512",
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

    /// What names and shapes do not say, and is fixed in the original code.
    fn own(&self) -> Result<Vec<String>> {
        let mut all = vec![];
        for Part { name, config, .. } in &self.parts {
            let at = if name.is_empty() { String::new() } else { format!("{name}: ") };
            for (key, want) in [("norm_num_groups", 32.0), ("norm_eps", 1e-5)] {
                if let Some(got) = config.opt_f64(key)?.filter(|got| *got != want) {
                    all.push(format!("{at}{key} {got} (theirs is {want})"));
                }
            }
            for key in ["use_quant_conv", "use_post_quant_conv"] {
                if config.opt_bool(key)? == Some(false) {
                    all.push(format!("{at}{key} false (theirs is true)"));
                }
            }
        }
        Ok(all)
    }

    fn to_folder(&self, to: &Path, dtype: Option<DType>) -> Result<(usize, usize)> {
        let cannot = |e| Error::file(to, format!("cannot be written: {e}"));
        let there = fs::symlink_metadata(to);
        let empty = || fs::read_dir(to).is_ok_and(|mut all| all.next().is_none());
        if there.is_ok_and(|there| !there.is_dir() || !empty()) {
            let why = "is there already: want a new folder, or a file that ends in .safetensors";
            return Err(Error::invalid(format!("{}: {why}", to.display())));
        }
        if to.file_name().is_none() {
            return Err(Error::invalid(format!("{}: names no folder", to.display())));
        }
        // Beside it, so that it can be moved; of a process that was killed there may be one of the same number.
        let mut tries = 0..1000;
        let begun = loop {
            let n = tries.next().unwrap_or_default();
            let begun = to.with_file_name(format!(".ldm-{}-{n}.tmp", std::process::id()));
            match fs::create_dir(&begun) {
                Ok(()) => break begun,
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && !tries.is_empty() => {}
                Err(e) => return Err(cannot(e)),
            }
        };
        let written = self.fill(&begun, dtype);
        let moved = written.and_then(|count| {
            fs::rename(&begun, to).map_err(cannot)?;
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
                let done = Box::new(move || part.weights.release(name));
                Ok(Piece { name: name.into(), entry, bytes: Box::new(move || part.bytes(name, dtype)), done })
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

fn values<'a>(name: &str, shape: Vec<usize>, values: Vec<f32>) -> Piece<'a> {
    let entry = Entry { dtype: StoredType::F32, shape };
    let bytes = move || Ok(Bytes::Stored(Cow::Owned(bytemuck::cast_slice(&values).to_vec())));
    Piece { name: name.into(), entry, bytes: Box::new(bytes), done: Box::new(|| ()) }
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
