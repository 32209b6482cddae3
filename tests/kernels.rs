//! The generated side of the kernels, and what the compiler says of their machine code.

use ldm::kernels::{self, DevicePtr, add};

#[test]
fn no_kernel_spills_or_has_a_stack() {
    if !kernels::COMPILED {
        println!("SKIPPED: built without nvcc");
        return;
    }
    println!("{}\n{}", kernels::report(), kernels::summary());
    let bad: Vec<_> = kernels::spilling();
    assert!(bad.is_empty(), "these use local memory: {bad:#?}");
    assert!(!kernels::RESOURCES.is_empty());
}

#[test]
fn every_unit_has_an_image_for_each_architecture() {
    for unit in kernels::UNITS {
        assert!(!unit.images.is_empty(), "{unit}");
        if kernels::ARCHS.contains(&"sm_90") {
            assert!(unit.images.iter().all(|i| i.arch != kernels::Arch::None), "{unit} was not compiled");
        }
    }
}

#[test]
fn a_kernel_file_has_its_twin_in_rust() {
    let params = add::AddFwd { y: DevicePtr(1), a: DevicePtr(2), b: DevicePtr::NULL, n: 3 };
    assert_eq!((params.y.offset(4), params.b.is_null(), params.n), (DevicePtr(5), true, 3));
    assert_eq!((add::ADD_FWD.stem(), add::ADD_FWD.name()), ("add", "add_fwd"));
    assert!(add::BLOCK.is_multiple_of(32));
    assert_eq!((add::TYPES, add::VARIANTS), (&["f32", "f16", "bf16"][..], &[""][..]));
    for types in add::TYPES {
        assert_eq!(kernels::unit("add", types, "").map(|u| u.types), Some(*types));
    }
    assert!(kernels::unit("add", "f32", "D=40").is_none());
}
