//! What a diffusion run is conditioned on: captions, through a text encoder and its tokenizer, classes, or nothing.

use super::export;
use super::memory::Load;
use super::run::{Watch, note};
use super::settings::{Conditioned, GivenEncoder, Settings, TextKind};
use super::source::Subject;
use super::step::Trainer;
use crate::data::source::Sample;
use crate::error::{Error, Result};
use crate::exec::{Device, Program, Target};
use crate::io::{Checkpoint, Config, Labels, Tokenizer, vocabulary, wordpiece};
use crate::models::{ClassEmbedder, Conditioner, Inventory, Model, Source};
use crate::pipeline::{Request, load, tokenizer_for};
use crate::tensor::{DType, HostTensor, Spec};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Keys of a checkpoint's notes: the names of the classes, and what tells a frozen text encoder from others.
const CLASSES: &str = "classes";
const ENCODER: &str = "text_encoder";

/// The model that makes the context, and what turns captions or classes into its ids.
pub(super) struct Condition {
    pub(super) model: Conditioner,
    /// Its `config.json`.
    config: Value,
    words: Words,
    /// The ids of nothing: of the empty caption, or of the null class.
    pub(super) nothing: Vec<i32>,
    given: Option<GivenEncoder>,
    /// Of a text encoder that is not trained: its program for a batch.
    frozen: Option<Program>,
    /// What a checkpoint must hold of it.
    notes: Vec<(String, String)>,
}

enum Words {
    /// Captions, and the tokenizer's folder.
    Captions {
        tokenizer: Box<Tokenizer>,
        folder: PathBuf,
    },
    Classes(Labels),
    Nothing,
}

impl Condition {
    /// Learns a vocabulary, where there is none in `folder` yet, or counts the classes; `notes` are those of the checkpoint that
    /// the run goes on from.
    pub(super) fn start(
        own: &Conditioned,
        subject: &Subject,
        (folder, batch): (&Path, usize),
        notes: &HashMap<String, String>,
        device: &Device,
        watch: &mut dyn Watch,
    ) -> Result<Condition> {
        if notes.is_empty() {
            // There is no checkpoint: a vocabulary that is there is of a run that came to nothing, perhaps with other settings.
            let _ = std::fs::remove_file(folder.join("tokenizer/tokenizer_config.json"));
        }
        let mut condition = match own {
            Conditioned::Captions { kind, config, vocabulary, given: None } => {
                let words = folder.join("tokenizer");
                learnt(*kind, config, *vocabulary, (subject, &words), watch)?
            }
            Conditioned::Captions { kind, config, given: Some(given), .. } => {
                begun(*kind, config, given, &folder.join("tokenizer"))?
            }
            Conditioned::Classes { width } => classes(*width, subject)?,
            Conditioned::Nothing => Condition {
                model: Conditioner::Nothing,
                config: Value::Null,
                words: Words::Nothing,
                nothing: vec![],
                given: None,
                frozen: None,
                notes: vec![],
            },
        };
        condition.notes = condition.stamp()?;
        for (key, value) in &condition.notes {
            if !notes.is_empty() && note::<String>(notes, key)? != *value {
                return Err(Error::invalid(match &condition.given {
                    Some(given) => format!(
                        "{}: want the text encoder that the run began with; its weights have changed since",
                        given.path.display()
                    ),
                    None => "classes: want those that the run began with; they have changed since".into(),
                }));
            }
        }
        if let Words::Captions { tokenizer, .. } = &condition.words {
            let room = tokenizer.max_length() - 2;
            let long = |caption: &String| tokenizer.encode(caption).is_ok_and(|e| e.tokens > room);
            let cut = subject.captions().iter().filter(|c| long(c)).count();
            if cut > 0 {
                watch.say(&format!(
                    "{cut} captions have more than {room} tokens and are cut (model.text_encoder.max_position_embeddings)"
                ));
            }
        }
        if let Some(given) = condition.given.as_ref().filter(|given| !given.train) {
            let weights = load(Checkpoint::open(&given.path)?, &condition.inventory()?, device)?;
            let graph = condition.model.context_graph(batch, condition.length(), DType::F32, 0)?;
            condition.frozen = Some(Program::new(graph, &weights, device)?);
        }
        Ok(condition)
    }

    fn inventory(&self) -> Result<Inventory> {
        Ok(Inventory::of(&self.model.inventory(DType::F32)?))
    }

    /// Tokens of the context.
    pub(super) fn length(&self) -> usize {
        self.nothing.len()
    }

    /// What is trained with the UNet; `None` where that gets a context, or none.
    pub(super) fn trained(&self) -> Option<&Conditioner> {
        (self.frozen.is_none() && self.model != Conditioner::Nothing).then_some(&self.model)
    }

    /// The memory of a text encoder that stays as it is, and of the tokenizer: as long as they are there, and in a step.
    pub(super) fn memory(&self, batch: usize, target: Target) -> Result<[Load; 2]> {
        // A tokenizer holds each of its words a few times (measured).
        let words = match &self.words {
            Words::Captions { .. } => self.model.vocabulary() * 500,
            Words::Classes(_) | Words::Nothing => 0,
        };
        if self.frozen.is_none() {
            return Ok([Load::host(words), Load::default()]);
        }
        let graph = self.model.context_graph(batch, self.length(), DType::F32, 0)?;
        let (stays, runs) = Load::program(&graph, target)?;
        Ok([stays.and(Load::host(words)), runs])
    }

    /// Weights to begin with, by the names of the step's parameters.
    pub(super) fn begin(&self) -> Result<Vec<(String, HostTensor)>> {
        let Some(given) = self.given.as_ref().filter(|given| given.train) else { return Ok(vec![]) };
        let source = Source::new(Checkpoint::open(&given.path)?, &self.inventory()?)?;
        let read = source.read(
            |_| true,
            |w| {
                let mut data = vec![0.0f32; w.spec.shape.numel()];
                w.fill(0..w.spec.shape[0], bytemuck::cast_slice_mut(&mut data))?;
                HostTensor::from_bytes(Spec::new(DType::F32, w.spec.shape), bytemuck::cast_slice(&data))
            },
        )?;
        Ok(read.into_iter().map(|(name, value)| (format!("{}.{name}", self.model.part()), value)).collect())
    }

    /// The step's input from ids (B·T) of whole batches: these (B,T), or a frozen encoder's context (B,T,E), or none.
    pub(super) fn input(&mut self, ids: Vec<i32>) -> Result<Option<(&'static str, HostTensor)>> {
        if self.nothing.is_empty() {
            return Ok(None);
        }
        let [rows, tokens] = [ids.len() / self.length(), self.length()];
        let Some(program) = &mut self.frozen else {
            return Ok(Some(("ids", HostTensor::i32([rows, tokens], ids)?)));
        };
        let batch = program.spec("ids")?;
        let mut context = vec![];
        for ids in ids.chunks(batch.shape.numel()) {
            program.write("ids", &HostTensor::i32(batch.shape, ids.to_vec())?)?;
            program.run(&mut ())?;
            context.extend(program.read("context")?.to_f32());
        }
        let width = context.len() / (rows * tokens).max(1);
        Ok(Some(("context", HostTensor::f32([rows, tokens, width], context)?)))
    }

    /// What a picture is said to show as ids (T).
    pub(super) fn ids(&self, caption: &str, class: Option<usize>) -> Result<Vec<i32>> {
        match (&self.words, class) {
            (Words::Captions { tokenizer, .. }, _) => Ok(tokenizer.encode(caption)?.ids),
            (Words::Classes(_), Some(class)) => Ok(vec![class as i32]),
            (Words::Nothing, _) => Ok(vec![]),
            (Words::Classes(_), None) => Err(Error::invalid("data: a picture without a class")),
        }
    }

    /// In a few words, for the log.
    pub(super) fn describe(&self) -> String {
        match &self.words {
            Words::Captions { tokenizer, .. } => format!("{} tokens", tokenizer.vocab_size()),
            Words::Classes(labels) => format!("{} classes", labels.iter().count()),
            Words::Nothing => "no condition".into(),
        }
    }

    /// What a checkpoint must hold of it.
    pub(super) fn notes(&self) -> &[(String, String)] {
        &self.notes
    }

    fn stamp(&self) -> Result<Vec<(String, String)>> {
        Ok(match (&self.words, &self.given) {
            (Words::Classes(labels), _) => vec![(CLASSES.into(), Value::Object(named(labels)).to_string())],
            (Words::Captions { .. }, Some(given)) if !given.train => {
                vec![(ENCODER.into(), Checkpoint::open(&given.path)?.fingerprint(|_| true)?)]
            }
            (Words::Captions { .. } | Words::Nothing, _) => vec![],
        })
    }

    /// Requests for the pictures that show how far a run is: of the prompts or classes that it was told, or of the first ones.
    pub(super) fn requests(&self, told: &[String]) -> Vec<Request> {
        let some: Vec<String> = match (&self.words, told) {
            (Words::Nothing, _) => vec![String::new(); 4],
            (_, [_, ..]) => told.to_vec(),
            (Words::Classes(labels), []) => labels.iter().take(4).map(|(_, name)| name.into()).collect(),
            (Words::Captions { .. }, []) => {
                ["a large red circle", "a small blue square", "a large green triangle", "a small yellow star"]
                    .map(String::from)
                    .into()
            }
        };
        some.into_iter().map(|words| self.request(words)).collect()
    }

    /// A request for a picture of a prompt or class.
    pub(super) fn request(&self, words: String) -> Request {
        match &self.words {
            Words::Captions { .. } => Request { prompt: words, ..Request::default() },
            Words::Classes(_) => Request { class: Some(words), ..Request::default() },
            Words::Nothing => Request::default(),
        }
    }

    /// A request for a picture of what one of the data shows.
    pub(super) fn request_of(&self, sample: &Sample) -> Request {
        let class = |labels: &Labels| {
            let found = labels.iter().find(|(number, _)| Some(*number) == sample.class);
            found.map(|(_, name)| name.to_string()).unwrap_or_default()
        };
        self.request(match &self.words {
            Words::Captions { .. } | Words::Nothing => sample.caption.clone(),
            Words::Classes(labels) => class(labels),
        })
    }

    /// Checks prompts or classes before a run.
    pub(super) fn check(&self, told: &[String]) -> Result<()> {
        match &self.words {
            Words::Captions { .. } => Ok(()),
            Words::Nothing if told.is_empty() => Ok(()),
            Words::Nothing => Err(Error::invalid("sample.prompts: want none where there is no condition")),
            Words::Classes(labels) => told.iter().try_for_each(|class| {
                labels.find(class).map(drop).map_err(|e| Error::invalid(format!("sample.prompts: {e}")))
            }),
        }
    }

    /// Writes the model and what belongs to it into an export.
    pub(super) fn export(&self, trainer: &Trainer, folder: &Path, s: &Settings) -> Result<()> {
        if self.model == Conditioner::Nothing {
            return Ok(());
        }
        let part = self.model.part();
        let to = folder.join(part);
        let stem = match &self.words {
            Words::Captions { .. } => "model",
            Words::Classes(_) | Words::Nothing => "diffusion_pytorch_model",
        };
        match &self.given {
            Some(given) if !given.train => {
                let weights = Checkpoint::open(&given.path)?;
                export::copied(&weights, (&to, stem), &self.config, s.export, |_, value| Ok(value))?
            }
            _ => export::component(&to, stem, &self.config, trainer, part, s)?,
        }
        if let Words::Captions { folder: words, .. } = &self.words {
            export::folder(&folder.join("tokenizer"))?;
            vocabulary::copy(words, &folder.join("tokenizer"))?;
        }
        Ok(())
    }

    /// What the autoencoder's folder is called in the export.
    pub(super) fn vae(&self) -> &'static str {
        if matches!(self.model, Conditioner::Bert(_) | Conditioner::Nothing) { "vqvae" } else { "vae" }
    }

    /// The pipeline's class and its own entries of `model_index.json`. diffusers runs a pipeline of classes too, when it is given
    /// rows of the table as `prompt_embeds`.
    pub(super) fn index(&self) -> Value {
        if self.model == Conditioner::Nothing {
            return json!({"_class_name": "LDMPipeline"});
        }
        if matches!(self.model, Conditioner::Bert(_)) {
            return json!({
                "_class_name": "LDMTextToImagePipeline",
                "bert": ["latent_diffusion", "LDMBertModel"],
                "tokenizer": ["transformers", "BertTokenizer"],
            });
        }
        let mut index = json!({
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [null, null],
            "image_encoder": [null, null],
            "requires_safety_checker": false,
            "safety_checker": [null, null],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        });
        if let Words::Classes(labels) = &self.words {
            index["class_embedder"] = json!(["ldm", ClassEmbedder::CLASSES[0]]);
            index["id2label"] = Value::Object(named(labels));
            for absent in ["text_encoder", "tokenizer"] {
                index[absent] = json!([null, null]);
            }
        }
        index
    }
}

/// Names of classes as `id2label` has them.
fn named(labels: &Labels) -> Map<String, Value> {
    labels.iter().map(|(number, name)| (number.to_string(), json!(name))).collect()
}

/// A text encoder that begins anew, with a vocabulary that is learnt from the captions once.
fn learnt(
    kind: TextKind,
    config: &Value,
    most: usize,
    (subject, folder): (&Subject, &Path),
    watch: &mut dyn Watch,
) -> Result<Condition> {
    let positions = config["max_position_embeddings"].as_u64().unwrap_or(77) as usize;
    if !folder.join("tokenizer_config.json").is_file() {
        let captions = subject.captions();
        if captions.iter().all(String::is_empty) {
            watch.say(
                "the pictures have no captions: the model will make pictures like them, whatever the prompt",
            );
        }
        export::folder(folder)?;
        match kind {
            TextKind::Clip => vocabulary::learn(&captions, most)?.write(folder, positions)?,
            TextKind::Bert => wordpiece::write(&wordpiece::learn(&captions, most)?, folder, positions)?,
        }
    }
    let tokenizer = Tokenizer::open(folder)?;
    let mut config = config.clone();
    config["vocab_size"] = json!(tokenizer.vocab_size());
    config["pad_token_id"] = json!(tokenizer.pad());
    if kind == TextKind::Clip {
        config["bos_token_id"] = json!(tokenizer.bos());
        config["eos_token_id"] = json!(tokenizer.eos());
    }
    let model = kind.model(&Config::from_value(folder.join("config.json"), config.clone())?)?;
    with_captions(model, config, tokenizer, folder, None)
}

/// A text encoder that was trained before, with its own tokenizer, of which the run keeps a copy in `folder`.
fn begun(kind: TextKind, config: &Value, given: &GivenEncoder, folder: &Path) -> Result<Condition> {
    let model = kind.model(&Config::from_value(given.path.join("config.json"), config.clone())?)?;
    if !folder.join("tokenizer_config.json").is_file() {
        Tokenizer::open(&given.tokenizer)?;
        export::folder(folder)?;
        vocabulary::copy(&given.tokenizer, folder)?;
    }
    with_captions(model, config.clone(), Tokenizer::open(folder)?, folder, Some(given.clone()))
}

fn with_captions(
    model: Conditioner,
    config: Value,
    tokenizer: Tokenizer,
    folder: &Path,
    given: Option<GivenEncoder>,
) -> Result<Condition> {
    let tokenizer = tokenizer_for(tokenizer, folder, &model)?;
    let nothing = tokenizer.encode("")?.ids;
    let words = Words::Captions { tokenizer: Box::new(tokenizer), folder: folder.into() };
    Ok(Condition { model, config, words, nothing, given, frozen: None, notes: vec![] })
}

fn classes(width: usize, subject: &Subject) -> Result<Condition> {
    let labels = Labels::new(subject.classes()?);
    // The last row is the null class.
    let null = labels.iter().last().map_or(0, |(number, _)| number + 1);
    let table = ClassEmbedder { classes: null + 1, width };
    let config = json!({
        "_class_name": ClassEmbedder::CLASSES[0], "n_classes": table.classes, "embed_dim": width, "key": "class_label",
    });
    let (model, words) = (Conditioner::Class(table), Words::Classes(labels));
    let nothing = vec![null as i32];
    Ok(Condition { model, config, words, nothing, given: None, frozen: None, notes: vec![] })
}
