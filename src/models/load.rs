//! Weights from a checkpoint to wherever the caller wants them: every tensor checked against what the graphs need.

use crate::error::{Error, Result};
use crate::graph::{Graph, Layout};
use crate::io::weights::Tensor;
use crate::io::{Checkpoint, Order, StoredType};
use crate::tensor::{DType, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The weights that graphs use, by name.
#[derive(Clone, Debug, Default)]
pub struct Inventory(BTreeMap<String, (Spec, Layout)>);

impl Inventory {
    /// The weights of several graphs together.
    pub fn of(graphs: &[Graph]) -> Inventory {
        let all = graphs.iter().flat_map(Graph::weights);
        Inventory(all.map(|(_, v, layout)| (v.name.clone(), (v.spec, layout))).collect())
    }

    /// Name, spec and layout of each weight, in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Spec, Layout)> {
        self.0.iter().map(|(name, &(spec, layout))| (name.as_str(), spec, layout))
    }

    /// Whether there is a weight of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.0.values().fold(0, |n, (s, _)| n.saturating_add(s.shape.numel()))
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.0.len()
    }

    /// Bytes in the type of the graphs.
    pub fn bytes(&self) -> usize {
        self.0.values().fold(0, |n, (s, _)| n.saturating_add(s.bytes()))
    }
}

/// Names that a tensor goes by in older files.
fn aliases(name: &str) -> Vec<String> {
    let mut all = vec![name.to_string()];
    // Attention between pixels before diffusers 0.18; that of transformers has blocks between.
    let layer = name.split_once(".attentions.").and_then(|(_, rest)| Some(rest.split_once('.')?.1));
    for (new, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
        let inner = layer.and_then(|layer| layer.strip_prefix(new)?.strip_prefix('.'));
        if let Some(inner) = inner {
            all.push(format!("{}{old}.{inner}", &name[..name.len() - new.len() - 1 - inner.len()]));
        }
    }
    // Text encoders saved without their outer module, or with it.
    match name.strip_prefix("text_model.") {
        Some(bare) => all.push(bare.into()),
        None => all.push(format!("text_model.{name}")),
    }
    all
}

/// Tensors that files carry and no model reads: constants that older versions stored, and the logits of `LDMBertModel`, which
/// nothing ever asks for.
pub(crate) fn is_unused(name: &str) -> bool {
    name.ends_with("embeddings.position_ids") || name.starts_with("to_logits.")
}

/// Whether diffusers has a matrix as a convolution of 1×1: then it is stored (O,I,1,1). `linear`: the configuration's
/// `use_linear_projection`.
pub fn is_convolution(name: &str, linear: bool) -> bool {
    let layer = name.strip_suffix(".weight").and_then(|stem| stem.rsplit('.').next());
    match layer {
        Some("conv_shortcut" | "quant_conv" | "post_quant_conv") => true,
        Some("proj_in" | "proj_out") => !linear,
        _ => false,
    }
}

/// Shapes under which a weight may be stored.
fn stored(spec: Spec, layout: Layout) -> Vec<Vec<usize>> {
    let s = spec.shape.to_vec();
    match (layout, &s[..]) {
        (Layout::Conv, &[o, kh, kw, i]) => vec![vec![o, i, kh, kw]],
        (Layout::Linear, &[o, i]) => vec![vec![o, i], vec![o, i, 1, 1]],
        _ => vec![s],
    }
}

/// A weight of a model, and the tensor of a checkpoint that holds it.
#[derive(Debug)]
struct Found {
    name: String,
    source: String,
    spec: Spec,
    layout: Layout,
}

/// A checkpoint that is known to hold what a model needs, and nothing else. No value has been read yet.
#[derive(Debug)]
pub struct Source {
    checkpoint: Checkpoint,
    found: Vec<Found>,
}

/// A weight as [`Source::read`] hands it out.
pub struct Weight<'a> {
    /// Its name in the graphs.
    pub name: &'a str,
    /// Type and axes as the engine holds it.
    pub spec: Spec,
    /// How the checkpoint stores it.
    pub layout: Layout,
    tensor: Tensor<'a>,
}

impl Weight<'_> {
    /// Converts rows of the outermost axis, as the engine holds them, into bytes of just their size, aligned to the
    /// type; then lets go of the file's pages. Any thread may ask for any rows.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a value that is not finite, or that the type cannot hold.
    pub fn fill(&self, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        let order = if self.layout == Layout::Conv { Order::ChannelsLast } else { Order::Stored };
        self.tensor.rows(rows, self.spec.dtype, order, out)
    }
}

/// Types that weights are read from.
const READABLE: [StoredType; 4] = [StoredType::F32, StoredType::F16, StoredType::BF16, StoredType::F64];

/// Bytes that one thread checks at a time.
const PART: usize = 1 << 20;

impl Source {
    /// Reads the values of every weight and keeps none, so that a fault is told before the work that it would spoil.
    ///
    /// # Errors
    /// [`Error::Tensor`] for the first weight with a value that is not finite, or that the type cannot hold.
    pub fn check(&self) -> Result<()> {
        let check = |w: &Weight| {
            let rows = w.spec.shape.first().copied().unwrap_or(1);
            let row = w.spec.bytes() / rows.max(1);
            let most = (PART / row.max(1)).clamp(1, rows.max(1));
            // As words, which are aligned for any type.
            let mut words = vec![0u64; (most * row).div_ceil(8)];
            let out: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
            (0..rows).step_by(most).try_for_each(|first| {
                let part = first..(first + most).min(rows);
                let bytes = part.len() * row;
                w.fill(part, &mut out[..bytes])
            })
        };
        self.read(|_| true, check).map(drop)
    }

    /// Finds every weight of the inventory in a checkpoint. Headers only are read.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that is missing, misshapen, or that nothing uses.
    pub fn new(checkpoint: Checkpoint, inventory: &Inventory) -> Result<Source> {
        let mut used = BTreeSet::new();
        let mut found = Vec::with_capacity(inventory.0.len());
        for (name, &(spec, layout)) in &inventory.0 {
            let shapes = stored(spec, layout);
            let want = || {
                let s = shapes.iter().map(|s| format!("({})", commas(s))).collect::<Vec<_>>();
                s.join(" or ")
            };
            let there = aliases(name).into_iter().find(|n| checkpoint.entry(n).is_some());
            let Some((source, entry)) = there.and_then(|n| checkpoint.entry(&n).cloned().map(|e| (n, e)))
            else {
                return Err(Error::Tensor {
                    file: checkpoint.path().into(),
                    name: checkpoint.stored_name(name),
                    want: want(),
                    got: "no such tensor; the file is incomplete or belongs to another model".into(),
                });
            };
            let wrong = |want, got| {
                let (file, name) = (checkpoint.file(&source).into(), checkpoint.stored_name(&source));
                Err(Error::Tensor { file, name, want, got })
            };
            if !shapes.contains(&entry.shape) {
                return wrong(want(), format!("({})", commas(&entry.shape)));
            }
            if !READABLE.contains(&entry.dtype) {
                return wrong("F32, F16, BF16 or F64".into(), entry.dtype.to_string());
            }
            used.insert(source.clone());
            found.push(Found { name: name.clone(), source, spec, layout });
        }
        if let Some(surplus) = checkpoint.names().find(|n| !used.contains(*n) && !is_unused(n)) {
            let shape = checkpoint.entry(surplus).map(|e| commas(&e.shape)).unwrap_or_default();
            return Err(Error::Tensor {
                file: checkpoint.file(surplus).into(),
                name: surplus.into(),
                want: "no tensor of this name, by the model's configuration".into(),
                got: format!("({shape}); file or configuration belong to another model"),
            });
        }
        Ok(Source { checkpoint, found })
    }

    /// The checkpoint, which holds what the model needs.
    pub fn into_checkpoint(self) -> Checkpoint {
        self.checkpoint
    }

    /// Lets the threads `make` something of each weight that is `wanted`, in order of name, and gives back what they made,
    /// in that order. Nothing is held here; the file's pages are let go as they are done, and the system fetches a tensor
    /// while the ones before it are converted.
    ///
    /// # Errors
    /// Of [`Checkpoint::tensor`] and of `make`: always that of the first name.
    pub fn read<T: Send>(
        &self,
        wanted: impl Fn(&str) -> bool,
        make: impl Fn(&Weight) -> Result<T> + Sync,
    ) -> Result<Vec<(String, T)>> {
        let wanted: Vec<&Found> = self.found.iter().filter(|f| wanted(&f.name)).collect();
        let (next, made) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
        // A queue, so that files are read from front to back, and no thread waits at the end of a tensor.
        rayon::broadcast(|_| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(Found { name, source, spec, layout }) = wanted.get(i).copied() else { return };
                let ahead = i + rayon::current_num_threads();
                wanted.get(ahead).into_iter().for_each(|f| self.checkpoint.prefetch(&f.source));
                let one = self.checkpoint.tensor(source);
                let one = one.and_then(|tensor| make(&Weight { name, spec: *spec, layout: *layout, tensor }));
                if one.is_err() {
                    // Those before are under way or done: the first error is among them.
                    next.fetch_max(wanted.len(), Ordering::Relaxed);
                }
                lock(&made).insert(i, one.map(|t| (name.clone(), t)));
            }
        });
        self.checkpoint.release_all();
        std::mem::take(&mut *lock(&made)).into_values().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn commas(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// The type that most of a checkpoint's parameters are stored in, as a compute type.
pub fn stored_type(checkpoint: &Checkpoint) -> DType {
    let most =
        checkpoint.dtypes().into_iter().max_by_key(|(_, total)| total.elements).map(|(t, _)| t.to_string());
    match most.as_deref() {
        Some("F16") => DType::F16,
        Some("BF16") => DType::BF16,
        _ => DType::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_between_pixels_has_older_names() {
        let old = |name: &str| {
            aliases(name).contains(&"x.attentions.1.query.weight".to_string())
                || aliases(name).contains(&"x.attentions.1.proj_attn.bias".to_string())
        };
        assert!(old("x.attentions.1.to_q.weight") && old("x.attentions.1.to_out.0.bias"));
        let transformer = "x.attentions.1.transformer_blocks.0.attn1.to_q.weight";
        assert_eq!(aliases(transformer).len(), 2, "{:?}", aliases(transformer));
        assert_eq!(
            aliases("encoder.mid_block.attentions.0.to_k.weight")[1],
            "encoder.mid_block.attentions.0.key.weight"
        );
    }
}
