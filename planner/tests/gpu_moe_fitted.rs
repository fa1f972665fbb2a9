//! The constants in `tierwise_cost::cost::gpu_moe` are those of tools/gpu-moe/fitted.json. Here and not beside them, because this
//! crate reads JSON.

use serde_json::Value;
use tierwise_cost::cost::{moe_fits, moe_formats};

#[test]
fn constants_are_the_fitted_ones() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/gpu-moe/fitted.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let fitted: Value = serde_json::from_str(&text).unwrap();
    let groups: Vec<&Value> = fitted["groups"].as_array().unwrap().iter().filter(|g| g["used"] == true).collect();
    let table: Vec<_> = moe_fits().collect();
    assert_eq!(groups.len(), table.len());
    for g in groups {
        let (gpu, format) = (g["gpu"].as_str().unwrap(), g["format"].as_str().unwrap());
        let f = table.iter().find(|f| f.gpu == gpu && f.format == format).unwrap_or_else(|| panic!("{gpu} {format}"));
        let number = |v: &Value| v.as_f64().unwrap();
        for (name, found) in [
            ("launch_s", f.launch_s),
            ("memory_share", f.memory_share),
            ("arithmetic_share", f.arithmetic_share),
            ("sharpness", f.sharpness),
        ] {
            let expected = number(&g[name]);
            assert!((found / expected - 1.0).abs() < 1e-9, "{gpu} {format} {name}: {found}, fitted {expected}");
        }
        assert_eq!([f.low_high.0, f.low_high.1], [number(&g["low_high"][0]), number(&g["low_high"][1])], "{gpu} {format}");
        assert!(moe_formats(g["device"].as_str().unwrap()).contains(&format), "{gpu} {format} is found by the device's name");
        // Of several kernels for one format, the one that was measured on most shapes.
        let shapes = |g: &Value| g["shapes"].as_u64().unwrap();
        let all = fitted["groups"].as_array().unwrap();
        assert!(all.iter().filter(|o| o["gpu"] == gpu && o["format"] == format).all(|o| shapes(o) <= shapes(g)));
    }
}
