//! The names and shapes of single files against those that the original code states for its published configurations
//! (`tests/golden/compvis`, made by `tools/compvis.py`).

use super::*;
use crate::graph::Layout;
use crate::models::load::is_convolution;
use crate::presets::{PRESETS, Preset};
use std::collections::BTreeSet;

fn golden(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compvis").join(name)).unwrap()
}

/// The lines that a part's tensors have in a file, from the weights that its graphs ask for.
fn lines(class: &str, config: &Config, alone: bool, open_clip: bool) -> BTreeSet<String> {
    let model = AnyModel::read(class, config).unwrap().unwrap();
    let inventory = Inventory::of(&model.inventory(DType::F32).unwrap());
    let names = match open_clip {
        true => Names::open_clip(config).unwrap(),
        false => Names::of(class, config, alone).unwrap(),
    };
    let linear = config.get("use_linear_projection") == Some(&json!(true));
    let mut all = BTreeSet::new();
    for (name, spec, layout) in inventory.iter() {
        let shape = spec.shape.to_vec();
        let saved = match (layout, &shape[..]) {
            (Layout::Conv, &[o, h, w, i]) => vec![o, i, h, w],
            (Layout::Linear, &[o, i]) if is_convolution(name, linear) => vec![o, i, 1, 1],
            _ => shape,
        };
        let theirs = names.theirs(name).unwrap_or_else(|| panic!("{class}: {name}"));
        let shape: Vec<String> = theirs.shape(&saved).iter().map(usize::to_string).collect();
        all.insert(format!("{}\t{}\n", theirs.name, shape.join(",")));
    }
    all
}

/// 64-bit FNV-1a.
fn hash(lines: &BTreeSet<String>) -> String {
    let eat = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
    format!("{:016x}", lines.iter().flat_map(|l| l.bytes()).fold(0xcbf2_9ce4_8422_2325, eat))
}

fn line(name: &str, shape: &[usize]) -> String {
    let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("{name}\t{}\n", shape.join(","))
}

/// What the original code keeps in a text encoder and no model reads.
fn unread(class: &str, config: &Config) -> Vec<String> {
    let at = "cond_stage_model.transformer.";
    match class {
        "CLIPTextModel" => vec![line(&format!("{at}text_model.embeddings.position_ids"), &[1, 77])],
        "LDMBertModel" => {
            let (words, width) = (config.usize("vocab_size").unwrap(), config.usize("d_model").unwrap());
            vec![
                line(&format!("{at}to_logits.weight"), &[words, width]),
                line(&format!("{at}to_logits.bias"), &[words]),
            ]
        }
        _ => vec![],
    }
}

#[test]
fn every_preset_has_the_names_and_shapes_of_the_original_code() {
    let table = golden("parts.tsv");
    let row = |name: &str, part: &str| {
        let found = table.lines().find(|l| l.starts_with(&format!("{name}\t{part}\t")));
        found.map(|l| l.split('\t').skip(2).map(String::from).collect::<Vec<_>>())
    };
    let mut seen = 0;
    for preset in PRESETS {
        // Both are of the same shapes.
        let original = if preset.name == "sd21-base" { "sd21" } else { preset.name };
        for (ours, theirs) in [("unet", "unet"), ("vae", "first_stage"), ("text_encoder", "cond_stage")] {
            let Some((class, config)) = preset.part(ours).unwrap() else { continue };
            let what = format!("{}: {ours}", preset.name);
            if class == "CLIPTextModel" && original == "sd21" {
                continue; // below: the file holds more
            }
            let [tensors, values, sum] = &row(original, theirs).unwrap_or_else(|| panic!("{what}"))[..]
            else {
                panic!("{what}");
            };
            // A preset of one part is a first stage by itself.
            let alone = preset.part("unet").unwrap().is_none();
            let mut all = lines(&class, &config, alone, false);
            all.extend(unread(&class, &config));
            let numbers = |l: &String| -> usize {
                let shape = l.trim_end().split_once('\t').unwrap().1;
                shape.split(',').map(|d| d.parse::<usize>().unwrap()).product()
            };
            assert_eq!(all.len().to_string(), *tensors, "{what}");
            assert_eq!(all.iter().map(numbers).sum::<usize>().to_string(), *values, "{what}");
            assert_eq!(hash(&all), *sum, "{what}");
            seen += 1;
        }
    }
    assert!(seen > 25, "only {seen} parts were compared");
}

#[test]
fn plain_attention_and_open_clip_have_theirs() {
    // CelebA-HQ of the paper: attention of pixels alone, heads 32 wide.
    let config = json!({
        "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "in_channels": 3, "out_channels": 3,
        "attention_head_dim": 32, "sample_size": 64,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    });
    let config = Config::from_value("celeba", config).unwrap();
    let original = golden("celebahq256-vq4.tsv");
    let want: BTreeSet<String> = original
        .lines()
        .filter(|l| l.starts_with("model.diffusion_model."))
        .map(|l| format!("{l}\n"))
        .collect();
    assert_eq!(lines("UNet2DModel", &config, false, false), want);

    // OpenCLIP's last layer and its logits are in the file, and stay there.
    let (class, config) = Preset::find("sd21").unwrap().part("text_encoder").unwrap().unwrap();
    let ours = lines(&class, &config, false, true);
    let names = Names::open_clip(&config).unwrap();
    let original = golden("sd21.tsv");
    let theirs = original.lines().filter(|l| l.starts_with("cond_stage_model."));
    let (mut kept, mut left) = (BTreeSet::new(), vec![]);
    for l in theirs {
        let (name, shape) = l.split_once('\t').unwrap();
        let shape = shape.split(',').filter(|d| !d.is_empty()).map(|d| d.parse().unwrap()).collect();
        let entry = Entry { dtype: StoredType::F16, shape };
        match names.ours(name, &entry).is_empty() {
            true => left.push(name.strip_prefix("cond_stage_model.model.").unwrap().to_string()),
            false => drop(kept.insert(format!("{l}\n"))),
        }
    }
    assert_eq!(kept, ours);
    let last = left.iter().filter(|n| n.starts_with("transformer.resblocks.23.")).count();
    assert_eq!((left.len(), last), (14, 12), "{left:?}");
}

/// From a name to the file's and back.
#[test]
fn names_lead_back() {
    for preset in PRESETS {
        for part in ["unet", "vae", "text_encoder"] {
            let Some((class, config)) = preset.part(part).unwrap() else { continue };
            let model = AnyModel::read(&class, &config).unwrap().unwrap();
            let names = Names::of(&class, &config, false).unwrap();
            let inventory = Inventory::of(&model.inventory(DType::F32).unwrap());
            for (name, spec, _) in inventory.iter() {
                let theirs = names.theirs(name).unwrap();
                let shape = theirs.shape(&spec.shape);
                let back = names.ours(&theirs.name, &Entry { dtype: StoredType::F32, shape });
                let found = back.iter().find(|alias| alias.name == name);
                let alias = found.unwrap_or_else(|| panic!("{name} of {}", theirs.name));
                assert_eq!((&alias.shape[..], alias.rows), (&spec.shape[..], theirs.form.rows), "{name}");
            }
        }
    }
    // What is not a part's is not taken for one, and what is not known stays to be noticed.
    let (class, config) = Preset::find("sd15").unwrap().part("unet").unwrap().unwrap();
    let names = Names::of(&class, &config, false).unwrap();
    let entry = Entry { dtype: StoredType::F32, shape: vec![1] };
    assert!(names.ours("first_stage_model.encoder.conv_in.weight", &entry).is_empty());
    let strange = "model.diffusion_model.control.weight";
    assert_eq!(names.ours(strange, &entry)[0].name, strange);
    assert!(names.theirs("down_blocks.9.resnets.0.conv1.weight").is_none());
}
