//! Weights from a checkpoint to wherever the caller wants them: every tensor checked against what the graphs need.

use crate::error::{Error, Result};
use crate::graph::{Graph, Layout};
use crate::io::Checkpoint;
use crate::tensor::{DType, HostTensor, Spec};
use std::collections::{BTreeMap, BTreeSet};

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
    // The autoencoders' attention before diffusers 0.18.
    for (new, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
        if name.contains("mid_block.attentions.") && name.contains(&format!(".{new}.")) {
            all.push(name.replace(&format!(".{new}."), &format!(".{old}.")));
        }
    }
    // Text encoders saved without their outer module, or with it.
    match name.strip_prefix("text_model.") {
        Some(bare) => all.push(bare.into()),
        None => all.push(format!("text_model.{name}")),
    }
    all
}

/// Tensors that files carry and no model reads: constants that older versions stored.
fn is_constant(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
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

/// Reads every weight of the inventory, converted to its type and layout, and hands it to `put`; then lets go of the
/// file's pages, so that nothing is held twice.
///
/// # Errors
/// [`Error::Tensor`] for a tensor that is missing, misshapen, not finite, or that nothing uses.
pub fn load(
    checkpoint: &Checkpoint,
    inventory: &Inventory,
    mut put: impl FnMut(&str, HostTensor) -> Result<()>,
) -> Result<()> {
    let mut used = BTreeSet::new();
    let mut found = Vec::with_capacity(inventory.0.len());
    // Everything is checked before anything is read.
    for (name, &(spec, layout)) in &inventory.0 {
        let shapes = stored(spec, layout);
        let want = || {
            let s = shapes.iter().map(|s| format!("({})", commas(s))).collect::<Vec<_>>();
            s.join(" or ")
        };
        let there = aliases(name).into_iter().find(|n| checkpoint.entry(n).is_some());
        let Some((source, entry)) = there.and_then(|n| checkpoint.entry(&n).cloned().map(|e| (n, e))) else {
            return Err(Error::Tensor {
                file: checkpoint.path().into(),
                name: name.clone(),
                want: want(),
                got: "no such tensor; the file is incomplete or belongs to another model".into(),
            });
        };
        if !shapes.contains(&entry.shape) {
            return Err(Error::Tensor {
                file: checkpoint.file(&source).into(),
                name: source,
                want: want(),
                got: format!("({})", commas(&entry.shape)),
            });
        }
        used.insert(source.clone());
        found.push((name, source, spec, layout));
    }
    if let Some(surplus) = checkpoint.names().find(|n| !used.contains(*n) && !is_constant(n)) {
        let shape = checkpoint.entry(surplus).map(|e| commas(&e.shape)).unwrap_or_default();
        return Err(Error::Tensor {
            file: checkpoint.file(surplus).into(),
            name: surplus.into(),
            want: "no tensor of this name, by the model's config.json".into(),
            got: format!("({shape}); the configuration belongs to another model"),
        });
    }
    for (name, source, spec, layout) in found {
        let tensor = checkpoint.read(&source, spec.dtype)?;
        let tensor = match layout {
            Layout::Conv => tensor.permute(&[0, 2, 3, 1])?,
            Layout::Linear | Layout::Same => tensor.reshape(spec.shape)?,
        };
        put(name, tensor)?;
        checkpoint.release(&source);
    }
    Ok(())
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
