//! Weights before the first step.

use crate::error::Result;
use crate::rng::Generator;
use crate::tensor::{DType, HostTensor, Shape, Spec};

/// Whether CompVis code starts a layer of the UNet at zero (`zero_module`): the last convolution of a residual block, the way
/// out of a transformer, and the model's last convolution.
pub fn is_zero_module(name: &str) -> bool {
    [".conv2.", ".proj_out.", "conv_out."].iter().any(|layer| name.contains(layer) || name.starts_with(layer))
}

/// Parameters as PyTorch's layers start: convolutions and linear layers, with their biases, uniform within ±1/√fan-in;
/// embeddings normal with deviation 0.02 (CLIP, BERT), of classes with 1; codebooks uniform within ±1/V; norms the identity. Shapes are those that the
/// engine holds, (O,KH,KW,I). What `zero` names starts at zero.
///
/// # Errors
/// None that shapes of real weights can have.
pub fn initial(
    parameters: &[(String, Shape)],
    zero: impl Fn(&str) -> bool,
    seed: u64,
) -> Result<Vec<HostTensor>> {
    let mut random = Generator::new(seed);
    let fan_in = |shape: &Shape| shape[1..].iter().product::<usize>().max(1);
    let mut all = vec![];
    for (name, shape) in parameters {
        let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem);
        let weight = parameters.iter().find(|(n, s)| n.strip_suffix(".weight") == Some(stem) && s.len() > 1);
        let n = shape.numel();
        let mut uniform = |limit: f64| -> Vec<f32> {
            (0..n).map(|_| ((2.0 * f64::from(random.uniform()) - 1.0) * limit) as f32).collect()
        };
        let data = if zero(name) {
            vec![0.0; n]
        } else if stem.ends_with("quantize.embedding") {
            uniform(1.0 / shape[0] as f64)
        } else if stem.ends_with("class_embedder.embedding") {
            random.randn(n)
        } else if ["embedding", "embed_tokens", "embed_positions"].iter().any(|end| stem.ends_with(end)) {
            random.randn(n).into_iter().map(|v| 0.02 * v).collect()
        } else if let Some((_, weight)) = weight {
            uniform(1.0 / (fan_in(weight) as f64).sqrt())
        } else {
            // A norm.
            vec![if [".weight", ".scale"].iter().any(|kind| name.ends_with(kind)) { 1.0 } else { 0.0 }; n]
        };
        all.push(HostTensor::from_bytes(Spec::new(DType::F32, *shape), bytemuck::cast_slice(&data))?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_start_as_pytorch_starts_them() {
        let shape = |s: &[usize]| Shape::new(s);
        let parameters = vec![
            ("a.conv1.weight".to_string(), shape(&[8, 3, 3, 4])),
            ("a.conv1.bias".to_string(), shape(&[8])),
            ("a.conv2.weight".to_string(), shape(&[8, 3, 3, 8])),
            ("norm.weight".to_string(), shape(&[8])),
            ("norm.bias".to_string(), shape(&[8])),
            ("token_embedding.weight".to_string(), shape(&[50, 40])),
            ("quantize.embedding.weight".to_string(), shape(&[100, 3])),
            ("class_embedder.embedding.weight".to_string(), shape(&[50, 40])),
            ("bert.model.embed_tokens.weight".to_string(), shape(&[50, 40])),
        ];
        let all = initial(&parameters, is_zero_module, 1).unwrap();
        let most = |i: usize| all[i].to_f32().iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let limit = 1.0 / 36.0f32.sqrt();
        assert!(most(0) <= limit && most(0) > 0.9 * limit && most(1) <= limit && most(1) > 0.0);
        assert_eq!(most(2), 0.0);
        assert!(most(6) <= 0.01 && most(6) > 0.009, "a codebook of 100");
        assert!(all[3].to_f32().iter().all(|&v| v == 1.0) && most(4) == 0.0);
        let deviation = |i: usize| (all[i].to_f32().iter().map(|v| v * v).sum::<f32>() / 2000.0).sqrt();
        assert!((deviation(8) - 0.02).abs() < 0.001, "{}", deviation(8));
        assert!((deviation(5) - 0.02).abs() < 0.001 && (deviation(7) - 1.0).abs() < 0.05, "{}", deviation(7));
    }
}
