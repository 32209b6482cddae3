//! `ldm data` and `ldm eval` as their users meet them.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;

use folder::{Folder, golden};
use ldm::io::png::{encode_rgb8, read_rgb8};
use program::{ldm, refused, text};
use serde_json::Value;
use std::fs;

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn a_drawn_folder_is_the_same_each_time_and_scores_full_marks() {
    let f = Folder::new();
    let [a, b] = ["new/a", "b"].map(|n| f.path(n));
    let o = ldm(&["data", "shapes", "-n", "40", "-o", text(&a), "--seed", "3", "--split", "unseen"]);
    assert_eq!((o.code, o.out), (0, format!("{}: 40 pictures of 64x64\n", a.display())), "{}", o.err);
    let metadata = fs::read_to_string(a.join("metadata.jsonl")).unwrap();
    let rows = lines(&metadata);
    assert_eq!(rows.len(), 40);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row["file_name"], format!("{i:04}.png"));
        let picture = read_rgb8(a.join(format!("{i:04}.png"))).unwrap();
        assert_eq!((picture.width, picture.height), (64, 64));
        assert_eq!(row["label"], row["objects"][0]["label"]);
    }
    // A part of the same stream, into a folder that is there and empty.
    fs::create_dir(&b).unwrap();
    let part = ["-n", "2", "--first", "30", "--seed", "3", "--split", "unseen"];
    assert_eq!(ldm(&[&["data", "shapes", "-o", text(&b)][..], &part].concat()).code, 0);
    assert!(fs::read(a.join("0031.png")).unwrap() == fs::read(b.join("0001.png")).unwrap());

    let o = ldm(&["eval", "shapes", text(&a)]);
    assert!(o.code == 0 && o.out.contains("40 pictures\n"), "{}{}", o.out, o.err);
    assert_eq!(o.out.matches("100.0 %").count(), 8, "{}", o.out);
    let o = ldm(&["eval", "shapes", text(&a), "--json"]);
    let report: Value = serde_json::from_str(&o.out).unwrap();
    assert_eq!(report["all"]["pictures"], 40);
    assert_eq!(report["all"]["scores"]["all"]["share"], 1.0);
    assert_eq!((&report["unseen_pairs"], &report["trained_pairs"]["pictures"]), (&report["all"], &0.into()));
    assert_eq!(report["each"][7]["prompt"], rows[7]["text"]);
    assert_eq!(report["each"][7]["seen"]["background"], rows[7]["background"]);
}

/// The score is of the pixels: prompts that were moved on by one are mostly wrong.
#[test]
fn pictures_of_something_else_score_low() {
    let f = Folder::new();
    let dir = f.path("x");
    for split in ["train", "unseen"] {
        let first = if split == "train" { "0" } else { "1" };
        let more = ["--split", split, "--first", first, "--force"];
        assert_eq!(ldm(&[&["data", "shapes", "-n", "30", "-o", text(&dir)][..], &more].concat()).code, 0);
        let prompts: Vec<String> = lines(&fs::read_to_string(dir.join("metadata.jsonl")).unwrap())
            .iter()
            .map(|row| row["text"].as_str().unwrap().into())
            .collect();
        fs::remove_file(dir.join("metadata.jsonl")).unwrap();
        let moved = [&prompts[1..], &prompts[..1]].concat().join("\n");
        for (prompts, right) in [(prompts.join("\n"), 30..31), (moved, 0..6)] {
            fs::write(dir.join("prompts.txt"), prompts).unwrap();
            let o = ldm(&["eval", "shapes", text(&dir), "--json"]);
            let report: Value = serde_json::from_str(&o.out).unwrap();
            let n = report["all"]["scores"]["all"]["right"].as_u64().unwrap();
            assert!(right.contains(&n), "{split}: {n} of 30 right");
        }
    }
    // Both kinds of prompts: a column for each.
    let one = ["a purple triangle"; 15].join("\n") + "\n" + &["a red circle"; 15].join("\n");
    fs::write(dir.join("prompts.txt"), one).unwrap();
    let o = ldm(&["eval", "shapes", text(&dir)]);
    let head = o.out.lines().next().unwrap().split("  ").map(str::trim);
    let head: Vec<&str> = head.filter(|w| !w.is_empty()).collect();
    assert_eq!(head, ["30 pictures", "15 trained pairs", "15 unseen pairs"]);
    assert_eq!(o.out.lines().count(), 9);
}

#[test]
fn requests_that_cannot_be_met_are_refused() {
    let f = Folder::new();
    f.write("file", "x");
    fs::create_dir(f.path("full")).unwrap();
    f.write("full/a.png", "x");
    let out = f.path("new");
    for (more, say) in [
        (&["-n", "0"][..], &["--count", "want 1 to", "got 0"][..]),
        (&["-n", "1", "--size", "16"], &["--size", "32 to 2048", "got 16"]),
        (&["-n", "1", "--split", "tset"], &["--split", "train, test, unseen", "`tset`"]),
        (&["-n", "1", "--objects", "3"], &["--objects", "want 1 or 2", "got 3"]),
        (&["-n", "2", "--first", "18446744073709551615"], &["--count"]),
        (&["-n", "-1"], &["-1"]),
        (&[], &["--count"]),
    ] {
        refused(&f, 2, say, || ldm(&[&["data", "shapes", "-o", text(&out)][..], more].concat()));
    }
    for (name, say) in
        [("full", "is not empty; choose another folder"), ("file", "want a folder"), ("file/x", "file/x: ")]
    {
        let out = f.path(name);
        refused(&f, 2, &[say], || ldm(&["data", "shapes", "-n", "1", "-o", text(&out)]));
    }
}

#[test]
fn folders_that_cannot_be_scored_are_refused() {
    let f = Folder::new();
    fs::create_dir(f.path("x")).unwrap();
    let dir = f.path("x");
    let score = || ldm(&["eval", "shapes", text(&dir)]);
    refused(&f, 1, &["want a folder of pictures"], score);
    f.write("x/a.png", encode_rgb8(64, 64, &[20; 64 * 64 * 3], None).unwrap());
    refused(&f, 1, &["no prompts here", "prompts.txt"], score);
    f.write("x/a.txt", "a lighthouse at night");
    refused(&f, 1, &["a.png", "want a caption of the shapes world", "`a lighthouse at night`"], score);
    f.write("x/a.txt", "a red circle");
    f.write("x/a.png", encode_rgb8(64, 32, &[20; 64 * 32 * 3], None).unwrap());
    refused(&f, 1, &["a.png", "want a square picture", "64x32"], score);
    f.write("x/a.png", encode_rgb8(8, 8, &[20; 8 * 8 * 3], None).unwrap());
    refused(&f, 1, &["a.png", "16x16 or more"], score);
    f.write("x/a.png", "no picture");
    refused(&f, 1, &["a.png", "not a readable picture", "want PNG, JPEG or WebP"], score);
}

/// As an autoencoder gives them back: PSNR of what diffusers makes with the same weights.
#[test]
fn reconstructions_of_an_autoencoder_are_those_of_diffusers() {
    let source = golden("data").join("source.png");
    for (model, psnr) in [("sd15-tiny", 10.248634), ("vq4-tiny", 10.126881)] {
        let o = ldm(&["eval", "reconstruction", text(&source), "--model", text(&golden(model)), "--json"]);
        let report: Value = serde_json::from_str(&o.out).unwrap_or_else(|e| panic!("{e}: {}", o.err));
        assert!((report["psnr"].as_f64().unwrap() - psnr).abs() < 2e-3, "{model}: {report}");
    }
    let f = Folder::new();
    let o = ldm(&["eval", "reconstruction", text(&source), "--model", text(&f.path(""))]);
    assert!(o.code == 2 && o.err.contains("want an autoencoder: a run"), "{}: {}", o.code, o.err);
    let o = ldm(&["eval", "reconstruction", text(&source)]);
    assert!(o.code == 2 && o.err.contains("<B>"), "{}", o.err);
}

#[test]
fn reconstructions_are_compared_picture_by_picture() {
    let data = golden("data");
    let [source, noise] = ["source.png", "noise.png"].map(|n| data.join(n));
    let o = ldm(&["eval", "reconstruction", text(&source), text(&noise)]);
    assert!(o.out.starts_with("              mean     worst  1 picture\n"), "{}{}", o.out, o.err);
    assert!(o.code == 0 && o.out.contains("30.19") && o.out.contains("0.9630  "), "{}{}", o.out, o.err);
    let f = Folder::new();
    for dir in ["a", "b", "b/in", "a/in"] {
        fs::create_dir_all(f.path(dir)).unwrap();
    }
    let copy = |from: &str, to: &str| f.write(to, fs::read(data.join(from)).unwrap());
    copy("source.png", "a/in/x.png");
    copy("noise.png", "b/in/x.jpg");
    copy("source.png", "a/y.png");
    copy("source.png", "b/y.png");
    let (a, b) = (f.path("a"), f.path("b"));
    let o = ldm(&["eval", "reconstruction", text(&a), text(&b), "--json"]);
    let report: Value = serde_json::from_str(&o.out).unwrap();
    assert_eq!((&report["pictures"], &report["psnr"]), (&2.into(), &Value::Null));
    assert_eq!(report["each"][0]["file"], "in/x");
    assert!((report["each"][0]["psnr"].as_f64().unwrap() - 30.188932318895514).abs() < 1e-9);
    assert!((report["ssim"].as_f64().unwrap() - (1.0 + 0.9629803578714086) / 2.0).abs() < 1e-9);
    // With weights of a narrow network: nothing lies between a picture and itself.
    let weights = golden("train/vq-hinge.safetensors");
    let o = ldm(&["eval", "reconstruction", text(&a), text(&b), "--json", "--lpips", text(&weights)]);
    let report: Value = serde_json::from_str(&o.out).unwrap();
    let each = |i: usize| report["each"][i]["lpips"].as_f64().unwrap();
    assert!(each(0) > 0.0 && each(1) == 0.0, "{report}");
    assert!((report["lpips"].as_f64().unwrap() - each(0) / 2.0).abs() < 1e-12);
    let o = ldm(&["eval", "reconstruction", text(&a), text(&b), "--lpips", text(&weights)]);
    assert!(o.code == 0 && o.out.lines().nth(3).unwrap().starts_with("LPIPS  "), "{}{}", o.out, o.err);
    let compare = |a: &str, b: &str| ldm(&["eval", "reconstruction", text(&f.path(a)), text(&f.path(b))]);
    refused(&f, 2, &["want two pictures or two folders", "y.png"], || compare("a", "b/y.png"));
    refused(&f, 2, &["none", "nothing at this path"], || compare("a", "none"));
    let none = f.path("none");
    refused(&f, 2, &["none: want a folder of pictures", "nothing at this path"], || {
        ldm(&["eval", "shapes", text(&none)])
    });
    copy("source.png", "b/z.png");
    refused(&f, 1, &["z.png", "no picture of this name in", "a"], || compare("a", "b"));
    refused(&f, 1, &["z.png", "no picture of this name in", "a"], || compare("b", "a"));
    copy("source.png", "a/z.jpg");
    f.write("b/z.png", encode_rgb8(16, 8, &[20; 16 * 8 * 3], None).unwrap());
    refused(&f, 1, &["z.jpg", "z.png", "want pictures of one size; got 72x48 and 16x8"], || {
        compare("a", "b")
    });
    copy("source.png", "b/z.webp");
    refused(&f, 1, &["z.webp", "z.png", "want one of each name"], || compare("a", "b"));
}
