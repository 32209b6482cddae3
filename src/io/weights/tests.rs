//! What files of tensors give, and what they refuse.

use super::*;
use crate::io::scratch::Scratch;
use crate::tensor::{Data, Spec};
use half::{bf16, f16};

fn sample() -> Vec<(String, HostTensor)> {
    vec![
        (
            "c.half".into(),
            HostTensor::new([3], Data::F16([0.5, -2.0, 65504.0].map(f16::from_f32).into())).unwrap(),
        ),
        ("a.weight".into(), HostTensor::f32([2, 2], vec![1.0, 2.5, -3.0, 1e5]).unwrap()),
        ("b.brain".into(), HostTensor::new([1], Data::BF16(vec![bf16::from_f32(1.5)])).unwrap()),
        ("d.ids".into(), HostTensor::i32([2, 1], vec![7, -9]).unwrap()),
    ]
}

fn text<T: std::fmt::Debug>(r: Result<T>) -> String {
    r.unwrap_err().to_string()
}

#[test]
fn threads_may_share_a_checkpoint() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
}

#[test]
fn what_is_saved_is_read_back() {
    let dir = Scratch::new("weights");
    let path = dir.path().join("x.safetensors");
    let notes = HashMap::from([("format".to_string(), "pt".to_string()), ("a".into(), "ü".into())]);
    save(&path, &sample(), Some(notes.clone())).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    save(&path, &sample(), Some(notes.clone())).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "the same bytes each time");
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());

    let c = Checkpoint::open(&path).unwrap();
    assert_eq!(c.names().collect::<Vec<_>>(), ["a.weight", "b.brain", "c.half", "d.ids"]);
    assert_eq!((c.metadata(), c.path(), c.file("a.weight"), c.len()), (&notes, &*path, &*path, 4));
    for (name, tensor) in sample() {
        assert_eq!(c.read(&name, tensor.spec().dtype).unwrap(), tensor);
        c.release(&name);
        assert_eq!(c.read(&name, tensor.spec().dtype).unwrap(), tensor, "after a release");
    }
    assert_eq!(c.entry("c.half"), Some(&Entry { dtype: StoredType::F16, shape: vec![3] }));
    assert_eq!(c.read_f32("c.half").unwrap(), [0.5, -2.0, 65504.0]);
    assert_eq!(c.read_i64("d.ids").unwrap(), [7, -9]);
    assert_eq!(c.dtypes()[&StoredType::F32], Total { tensors: 1, elements: 4, bytes: 16 });
    assert_eq!(c.dtypes().len(), 4);
}

#[test]
fn errors_name_file_tensor_and_value() {
    let dir = Scratch::new("weights");
    let path = dir.path().join("x.safetensors");
    let mut tensors = sample();
    tensors.push(("bad".into(), HostTensor::f32([2, 3], vec![0., 0., 0., 0., f32::NAN, 0.]).unwrap()));
    save(&path, &tensors, None).unwrap();
    let c = Checkpoint::open(&path).unwrap();
    let at = format!("{}: tensor ", path.display());
    for (e, say) in [
        (
            text(c.read("a.weigth", DType::F32)),
            "`a.weigth`: want this tensor; got 5 others; the nearest name is `a.weight`",
        ),
        (text(c.read("bad", DType::F32)), "`bad`: want finite values; got NaN at [1, 1]"),
        (text(c.read_f32("bad")), "`bad`: want finite values; got NaN at [1, 1]"),
        (
            text(c.read("a.weight", DType::F16)),
            "`a.weight`: want values that f16 can hold; got 100000 at [1, 1]",
        ),
        (text(c.read("a.weight", DType::I32)), "`a.weight`: want I64 or I32; got F32"),
        (text(c.read("d.ids", DType::BF16)), "`d.ids`: want F32, F16, BF16 or F64; got I32"),
        (text(c.read_i64("c.half")), "`c.half`: want I64 or I32; got F16"),
    ] {
        assert!(e.starts_with(&at) && e.contains(say), "{e}");
    }
    let twice = [sample(), sample()].concat();
    assert!(text(save(&path, &twice, None)).contains("comes twice"));
    let reserved = [("__metadata__".to_string(), HostTensor::zeros(Spec::new(DType::F32, [1])))];
    assert!(text(save(&path, &reserved, None)).contains("reserved"));
    assert!(text(save(dir.path().join("no/x"), &sample(), None)).contains("does not exist"));
}

#[test]
fn folders_are_searched_by_preference() {
    let dir = Scratch::new("weights");
    let folder = dir.path();
    assert!(
        text(Checkpoint::open(folder)).contains("holds no weights: want diffusion_pytorch_model.safetensors")
    );
    dir.file("diffusion_pytorch_model.bin", "x");
    assert!(text(Checkpoint::open(folder)).contains("pickle"));
    dir.file("model_index.json", "{}");
    assert!(text(Checkpoint::open(folder)).contains("whole pipeline"));
    let mut seen = vec![];
    for name in [
        "diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
    ] {
        save(folder.join(name), &sample()[..1], None).unwrap();
        seen.push(Checkpoint::open(folder).unwrap().file("c.half").ends_with(name));
    }
    assert_eq!(seen, [true; 3]);
    assert!(text(Checkpoint::open(folder.join("none.safetensors"))).contains("cannot be opened"));
}

#[test]
fn shards_are_one_checkpoint() {
    let dir = Scratch::new("weights");
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let tensors = sample();
    save(dir.path().join(one), &tensors[..2], None).unwrap();
    save(dir.path().join(two), &tensors[2..], None).unwrap();
    let index = |map: serde_json::Value| {
        dir.file(
            "model.safetensors.index.json",
            serde_json::json!({"metadata": {}, "weight_map": map}).to_string(),
        );
        Checkpoint::open(dir.path())
    };
    let right = serde_json::json!({"a.weight": one, "c.half": one, "b.brain": two, "d.ids": two});
    let c = index(right.clone()).unwrap();
    assert!(c.file("d.ids").ends_with(two) && c.len() == 4);
    assert_eq!(c.read("d.ids", DType::I32).unwrap(), tensors[3].1);

    let with = |key: &str, value: serde_json::Value| {
        let mut map = right.clone();
        map[key] = value;
        text(index(map))
    };
    assert!(with("a.weight", two.into()).contains("`a.weight`: want this tensor in model-00002"));
    assert!(with("extra", one.into()).contains("`extra`: want this tensor in model-00001"));
    assert!(with("a.weight", "gone.safetensors".into()).contains("gone.safetensors: not found;"));
    assert!(
        with("a.weight", "../x.safetensors".into()).contains("weight_map.a.weight`: want the name of a file")
    );
    assert!(with("a.weight", "/etc/passwd".into()).contains("in the same folder"));
    assert!(with("a.weight", 3.into()).contains("want a string; got 3"));
    let mut fewer = right.clone();
    fewer.as_object_mut().unwrap().remove("d.ids");
    assert!(text(index(fewer)).contains("`d.ids`: want only tensors that the index lists"));
    assert!(text(index(serde_json::json!(null))).contains("`weight_map`: want an object"));

    save(dir.path().join(two), &tensors[1..], None).unwrap();
    assert!(text(index(right)).contains("`a.weight`: want each tensor in one shard"));
}
