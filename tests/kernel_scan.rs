//! The scanner of kernel files: what it reads, and what it refuses, with file and line.

#[path = "../build/scan.rs"]
#[allow(dead_code)]
mod scan;

use scan::{Kind, Unit, camel_case, scan};

const GOOD: &str = r#"// y = x
// types: f32 f32>bf16
// variants: BM=128,BN=64 BM=64,BN=64
#include "dev.cuh"
constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / WARP, TILE = (WARPS + 1) * 4 - 0x10, BIG = 1 << 10;
constexpr int VEC = 16 / int(sizeof(T));
#ifdef T_F32
constexpr int STAGES = 2;
#endif
/* struct CopyFwd { int wrong; }; threadIdx */
struct CopyFwd {
    U* y;                     // (B,H,W,C)
    const T *x, *z;           // (B,H,W,C)
    int h, w;
    unsigned flags;
    long long n; // elements
    unsigned long long seed;
    float eps;
    double scale;
    TensorMap first, second;  // of x
};
extern "C" __global__ void __launch_bounds__(BLOCK * (1 + 1), 2) copy_fwd(const __grid_constant__ CopyFwd p) {}
"#;

#[test]
fn reads_a_unit() {
    let unit = scan("copy", GOOD).unwrap();
    assert_eq!(unit.types, [("f32".into(), None), ("f32".into(), Some("bf16".into()))]);
    let images = ["f32", "f32>bf16"]
        .iter()
        .flat_map(|t| ["BM=128,BN=64", "BM=64,BN=64"].map(|v| (t.to_string(), v.into())));
    assert_eq!(unit.images(), images.collect::<Vec<_>>());
    assert_eq!(
        Unit::defines(&unit.types[1], &unit.variants[0]),
        ["-DT_F32", "-DU_BF16", "-DBM=128", "-DBN=64"]
    );
    let constants: Vec<(&str, &[i64])> =
        unit.constants.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
    assert_eq!(constants[..2], [("BM", &[128, 64][..]), ("BN", &[64, 64])]);
    assert_eq!(
        constants[2..],
        [("BLOCK", &[256, 256][..]), ("WARPS", &[8, 8]), ("TILE", &[20, 20]), ("BIG", &[1024, 1024])]
    );
    assert_eq!((unit.smem(0), unit.smem(1)), (0, 0));
    let kernel = &unit.kernels[0];
    assert_eq!((kernel.name.as_str(), kernel.params_struct.as_str()), ("copy_fwd", "CopyFwd"));
    assert_eq!(kernel.bounds.as_deref(), Some("BLOCK * ( 1 + 1 )"));
    let fields: Vec<(&str, Kind)> = kernel.fields.iter().map(|f| (f.name.as_str(), f.kind)).collect();
    let p = Kind::Pointer;
    assert_eq!(
        fields[..6],
        [("y", p), ("x", p), ("z", p), ("h", Kind::I32), ("w", Kind::I32), ("flags", Kind::U32)]
    );
    assert_eq!(
        fields[6..],
        [
            ("n", Kind::I64),
            ("seed", Kind::U64),
            ("eps", Kind::F32),
            ("scale", Kind::F64),
            ("first", Kind::Map),
            ("second", Kind::Map)
        ]
    );
    assert_eq!(Kind::Map.size(), 128);
    assert_eq!(kernel.fields[2].comment, "(B,H,W,C)");
    assert_eq!(kernel.fields[2].kind.size() + kernel.fields[3].kind.size(), 12);
    assert_eq!(camel_case("conv2d_bwd_w"), "Conv2dBwdW");
}

#[test]
fn defaults_to_three_types_and_one_variant() {
    let plain =
        GOOD.replace("// types: f32 f32>bf16\n", "").replace("// variants: BM=128,BN=64 BM=64,BN=64\n", "");
    let unit = scan("copy", &plain).unwrap();
    assert_eq!(unit.images(), ["f32", "f16", "bf16"].map(|t| (t.to_string(), String::new())));
}

#[test]
fn evaluates_constants_in_each_variant() {
    let value = |expression: &str| {
        let text = GOOD.replace("int BLOCK = 256", &format!("int LAST = 1, BLOCK = {expression}"));
        let unit = scan("copy", &text).unwrap();
        unit.constants.iter().find(|(name, _)| name == "BLOCK").map(|(_, values)| values.clone())
    };
    for (expression, want) in [
        ("BM * 2", [256, 128]),
        ("BM > 64 ? 3 : 4", [3, 4]),
        ("BM <= BN ? BM == 64 ? 1 : 2 : BM >= 128 ? 5 : 6", [5, 1]),
        ("(BM < 128) + (BM != 128) * 2 + (BM == 128 && BN == 64) * 4", [4, 3]),
        ("BM == 128 || BN == 128 ? 1 << 3 : 64 >> 2", [8, 16]),
        ("1 + 2 < 3 + 1 ? 2 * (BM > BN ? BM : BN) : 0", [256, 128]),
        ("-BM < 0 ? -(BM) : LAST", [-128, -64]),
    ] {
        assert_eq!(value(expression).as_deref(), Some(&want[..]), "{expression}");
    }
    for unknown in ["BK", "BM ? 1", "BM / 0", "int(sizeof(T))", "BM < < 1 2", "1 <", "(1"] {
        assert_eq!(value(unknown), None, "{unknown}");
    }
}

#[test]
fn a_struct_may_hold_arrays() {
    let with = |line: &str| {
        let text =
            GOOD.replace("struct CopyFwd {", &format!("constexpr int MOST = 8;\nstruct CopyFwd {{\n{line}"));
        scan("copy", &text)
    };
    let unit = with("    const T* all[MOST];  // (O_i,C)\n    int ends[3], last;").unwrap();
    let fields: Vec<_> =
        unit.kernels[0].fields[..3].iter().map(|f| (&*f.name, f.kind, f.count, f.size())).collect();
    let want =
        [("all", Kind::Pointer, Some(8), 64), ("ends", Kind::I32, Some(3), 12), ("last", Kind::I32, None, 4)];
    assert_eq!(fields, want);
    assert_eq!(unit.kernels[0].fields[0].comment, "(O_i,C)");
    for line in ["int w[BM];", "int w[0];", "int w[33];", "int w[UNKNOWN];"] {
        let error = with(line).expect_err(line);
        assert!(error.contains("want as many elements in every variant, 1 to 32"), "{error}");
    }
    assert!(with("int w[2][2];").expect_err("two axes").contains("or arrays of them"));
}

#[test]
fn a_file_asks_for_dynamic_shared_memory_by_variant() {
    let with = |line: &str| GOOD.replace("struct CopyFwd {", &format!("{line}\nstruct CopyFwd {{"));
    let unit = scan("copy", &with("constexpr int SMEM_BYTES = (BM + BN) * 512;")).unwrap();
    assert_eq!((unit.smem(0), unit.smem(1)), (98304, 65536));
    assert!(unit.asserts(1).contains("static_assert(SMEM_BYTES == 65536"), "{}", unit.asserts(1));
    for (line, says) in [
        ("constexpr int SMEM_BYTES = 64 * int(sizeof(T));", "got no such value"),
        ("constexpr int SMEM_BYTES = BM * 2048;", "want 1 to 232448"),
        ("constexpr int SMEM_BYTES = BM - 128;", "got [0, -64]"),
        ("#ifdef T_F32\nconstexpr int SMEM_BYTES = 64;\n#endif", "got no such value"),
    ] {
        let error = scan("copy", &with(line)).expect_err(says);
        assert!(error.contains("kernels/copy.cu:1") && error.contains(says), "want `{says}`; got `{error}`");
    }
}

#[test]
fn a_file_says_what_its_main_loop_holds() {
    let with = |line: &str| GOOD.replace("struct CopyFwd {", &format!("{line}\nstruct CopyFwd {{"));
    let unit = scan("copy", &with("constexpr int LOOP_HMMA = BM / 16 * 8, LOOP_LDSM = 4;")).unwrap();
    assert_eq!(unit.loops(0), [("HMMA", 64), ("LDSM", 4)]);
    assert_eq!(unit.loops(1), [("HMMA", 32), ("LDSM", 4)]);
    assert!(scan("copy", GOOD).unwrap().loops(0).is_empty());
    for line in ["constexpr int LOOP_HMMA = int(sizeof(T));", "constexpr int LOOP_HMMA = BM - 128;"] {
        let error = scan("copy", &with(line)).expect_err(line);
        assert!(error.contains("`constexpr int LOOP_HMMA`: want a count in each variant"), "{error}");
    }
}

#[test]
fn refuses_what_a_kernel_may_not_do() {
    let body = |text: &str| GOOD.replace(" p) {}", &format!(" p) {{\n{text}\n}}"));
    for (source, says) in [
        (body("asm(\"\");"), "copy.cu:24: `asm`"),
        (body("int i = threadIdx.x;"), "want thread_x()"),
        (body("__shared__ float s[4];"), "want smem<Struct>()"),
        (body("v = __shfl_down_sync(~0u, v, 1);"), "`__shfl_down_sync`"),
        (GOOD.replace("dev.cuh", "cuda_fp16.h"), "copy.cu:4: want no include but"),
        (GOOD.replace("dev.cuh", "add_tile.cuh"), "copy.cu:4: want no include but"),
        (GOOD.replace("dev.cuh", "copy_tile.h"), "copy.cu:4: want no include but"),
        (GOOD.replace("f32>bf16", "f32>f64"), "copy.cu:2: want types"),
        (GOOD.replace("BM=64,", "BM:64,"), "copy.cu:3: want variants"),
        (GOOD.replace("struct CopyFwd {\n", "struct Copy {\n"), "no `struct CopyFwd"),
        (
            GOOD.replace("__grid_constant__ CopyFwd", "__grid_constant__ Copy"),
            "want its struct to be `CopyFwd`",
        ),
        (GOOD.replace("(const __grid_constant__ CopyFwd p)", "(float* y, int n)"), "want one parameter"),
        (GOOD.replace("float eps;", "half eps;"), "copy.cu:19: `CopyFwd`"),
        (GOOD.replace("float eps;", "float eps[4][2];"), "copy.cu:19: `CopyFwd`"),
        (GOOD.replace("int h, w;", "int h, y;"), "`CopyFwd.y` is there twice"),
        (GOOD.replace("extern \"C\" ", ""), "want `extern \"C\" __global__ void`"),
        ("#include \"dev.cuh\"\n".to_string(), "no kernel"),
    ] {
        let error = scan("copy", &source).expect_err(says);
        assert!(error.contains("kernels/copy.cu") && error.contains(says), "want `{says}`; got `{error}`");
    }
}

#[test]
fn reads_every_kernel_file() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "cu") {
            let stem = path.file_stem().unwrap().to_str().unwrap();
            scan(stem, &std::fs::read_to_string(&path).unwrap()).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
