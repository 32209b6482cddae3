//! The built-in configurations: parameters as Rombach et al. 2022 and the published checkpoints have them.

use ldm::exec::{Device, Program};
use ldm::models::{Inventory, Model};
use ldm::pipeline::{Parts, Vae, random_weights};
use ldm::presets::{PRESETS, Preset};
use ldm::tensor::{DType, HostTensor};

/// Parameters of text encoder, UNet, autoencoder; then tensors of the UNet, where they are published.
const COUNTS: &[(&str, usize, usize, usize, usize)] = &[
    ("sd15", 123_060_480, 859_520_964, 83_653_863, 686),
    // Five more input channels of 3 × 3 into 320.
    ("sd15-inpainting", 123_060_480, 859_520_964 + 5 * 9 * 320, 83_653_863, 686),
    ("sd21-base", 340_387_840, 865_910_724, 83_653_863, 686),
    ("sd21", 340_387_840, 865_910_724, 83_653_863, 686),
    ("txt2img-1p4B-kl8", 0, 872_300_484, 83_653_863, 686),
    ("text2img256-vq4", 0, 403_623_939, 55_322_782, 688),
    ("cin256-v1-vq8", 0, 394_984_196, 67_717_295, 626),
    ("cin256-v2-vq4", 0, 400_920_579, 55_322_782, 688),
    ("layout2img-openimages256-vq4", 0, 246_277_379, 55_322_782, 1328),
    ("kl-f4", 0, 0, 55_312_063, 0),
    ("kl-f8", 0, 0, 83_653_863, 0),
    ("kl-f16", 0, 0, 69_610_963, 0),
    ("kl-f32", 0, 0, 103_880_131, 0),
    ("vq-f4", 0, 0, 55_322_782, 0),
    ("vq-f4-noattn", 0, 0, 53_219_486, 0),
    ("vq-f8", 0, 0, 67_717_295, 0),
    ("vq-f8-n256", 0, 0, 67_652_783, 0),
    ("vq-f16", 0, 0, 69_593_371, 0),
];

#[test]
fn parameters_are_the_published_ones() {
    assert_eq!(
        COUNTS.iter().map(|c| c.0).collect::<Vec<_>>(),
        PRESETS.iter().map(|p| p.name).collect::<Vec<_>>()
    );
    for &(name, text, unet, vae, tensors) in COUNTS {
        let parts = Parts::preset(Preset::find(name).unwrap()).unwrap();
        let count = |inventory: Inventory| (inventory.parameters(), inventory.tensors());
        let f = DType::F32;
        let got_text = parts.text.as_ref().map_or((0, 0), |m| count(Inventory::of(&m.inventory(f).unwrap())));
        let got_unet = parts.unet.as_ref().map_or((0, 0), |m| count(Inventory::of(&m.inventory(f).unwrap())));
        let got_vae = parts.vae.as_ref().map_or((0, 0), |m| count(m.inventory(f).unwrap()));
        assert_eq!((got_text.0, got_unet, got_vae.0), (text, (unet, tensors), vae), "{name}");
        assert_eq!(parts.schedule.is_some(), parts.unet.is_some(), "{name}");
        if let (Some(text), Some(unet)) = (&parts.text, &parts.unet) {
            assert_eq!(text.width().0, unet.context, "{name}");
        }
    }
}

/// Through the whole depth of a decoder nothing grows or vanishes, in any type.
#[test]
fn random_weights_keep_activations_finite() {
    let parts = Parts::preset(Preset::find("vq-f4-noattn").unwrap()).unwrap();
    let Some(vae @ Vae::Vq(_)) = &parts.vae else { panic!("a VQModel") };
    for dtype in [DType::F32, DType::BF16] {
        let weights = random_weights(&vae.inventory(dtype).unwrap(), &Device::Cpu, 0).unwrap();
        let graph = vae.decode_graph([1, 4, 4], dtype).unwrap();
        let mut program = Program::new(graph, &weights, &Device::Cpu).unwrap();
        let z: Vec<f32> = (0..48).map(|i| (i as f32).sin()).collect();
        program.write("latents", &HostTensor::f32([1, 4, 4, 3], z).unwrap()).unwrap();
        program.run(&mut ()).unwrap();
        let y = program.read("image").unwrap().to_f32();
        let size = (y.iter().map(|v| v * v).sum::<f32>() / y.len() as f32).sqrt();
        assert!(size > 0.05 && size < 20.0, "{dtype}: root mean square {size}");
    }
}
