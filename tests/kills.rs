//! Training runs that are killed at random moments: `LDM_KILLS=20 cargo test --test kills -- --nocapture` for at least as many
//! of each kind.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;
#[path = "common/runs.rs"]
mod runs;

use folder::Folder;
use runs::{autoencoder_arguments, check_kills, first_stage, goes_on};

fn autoencoder(more: &[&str]) {
    let more = [more, &["steps=24", "checkpoint.every=3", "checkpoint.newest=2"]].concat();
    let f = Folder::new();
    goes_on(&f, 24, |run| autoencoder_arguments(run, &more).into_iter().map(String::from).collect());
}

#[test]
fn an_autoencoder_run_goes_on_bit_for_bit() {
    autoencoder(&[]);
}

/// The discriminator starts in between.
#[test]
fn a_run_with_a_codebook_and_a_discriminator_goes_on_bit_for_bit() {
    autoencoder(&[
        "model._class_name=VQModel",
        "model.num_vq_embeddings=32",
        "loss.discriminator={kind=\"hinge\", weight=0.8, width=4, layers=2, start=4}",
        "accumulate=2",
        "average.decay=0.9",
    ]);
}

#[test]
fn diffusion_runs_go_on_bit_for_bit() {
    for more in [&[][..], &["data.count=7", "accumulate=2"]] {
        let f = Folder::new();
        check_kills(&f, &first_stage(&f), more);
    }
}
