//! `ldm sample` against the pictures that diffusers makes from the same seed: noise, sampler, guidance, encoder and
//! rounding together. Made by `tools/golden_pictures.py`.

use ldm::io::png;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

#[test]
fn the_same_seed_makes_the_picture_of_diffusers() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = golden.join("pictures");
    let commands = std::fs::read_to_string(folder.join("commands.json")).unwrap();
    let commands: BTreeMap<String, Vec<String>> = serde_json::from_str(&commands).unwrap();
    assert_eq!(commands.len(), 15);
    let out = std::env::temp_dir().join(format!("ldm-pictures-{}", std::process::id()));
    std::fs::create_dir_all(&out).unwrap();
    for (name, arguments) in commands {
        let file = out.join("picture.png");
        let status = Command::new(env!("CARGO_BIN_EXE_ldm"))
            .current_dir(&folder)
            .args(["sample", "--device", "cpu", "-q"])
            .args(&arguments)
            .arg("-o")
            .arg(&file)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{name}");
        let (ours, theirs) =
            (png::read_rgb8(&file).unwrap(), png::read_rgb8(folder.join(format!("{name}.png"))).unwrap());
        assert_eq!((ours.width, ours.height), (theirs.width, theirs.height), "{name}");
        let pairs = ours.pixels.iter().zip(&theirs.pixels);
        let differ: Vec<u8> = pairs.map(|(a, b)| a.abs_diff(*b)).filter(|d| *d > 0).collect();
        // A value that falls on the edge between two bytes may be rounded either way.
        let share = differ.len() as f64 / theirs.pixels.len() as f64;
        assert!(differ.iter().all(|d| *d == 1) && share < 2e-3, "{name}: {} bytes differ", differ.len());
    }
    std::fs::remove_dir_all(&out).unwrap();
}
