//! Every WGSL source is valid with the least capabilities it may need, and is what its description says.

use naga::valid::{Capabilities, ValidationFlags, Validator};
use tierwise_shaders::{Access, Shader, WGSL};

/// Reading f16 scales with `unpack2x16float` needs this one; no subgroups, no f16 arithmetic.
const LEAST: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

fn parse(shader: &Shader) -> naga::Module {
    naga::front::wgsl::parse_str(shader.source)
        .unwrap_or_else(|e| panic!("{}: {}", shader.entry_point, e.emit_to_string(shader.source)))
}

#[test]
fn every_source_validates_and_translates_to_spirv() {
    for shader in WGSL {
        let module = parse(shader);
        let info = Validator::new(ValidationFlags::all(), LEAST)
            .validate(&module)
            .unwrap_or_else(|e| panic!("{}: {}", shader.entry_point, e.emit_to_string(shader.source)));
        let words = naga::back::spv::write_vec(&module, &info, &naga::back::spv::Options::default(), None)
            .unwrap_or_else(|e| panic!("{}: {e}", shader.entry_point));
        assert!(words.len() > 100, "{}", shader.entry_point);
    }
}

#[test]
fn descriptions_match_the_sources() {
    for shader in WGSL {
        let module = parse(shader);
        let entry = module.entry_points.iter().find(|e| e.name == shader.entry_point).expect("the entry point exists");
        assert_eq!(entry.workgroup_size, shader.workgroup, "{}", shader.entry_point);
        let mut found: Vec<(u32, String, Access)> = module
            .global_variables
            .iter()
            .filter_map(|(_, v)| {
                let binding = v.binding.as_ref()?;
                assert_eq!(binding.group, 0, "{}", shader.entry_point);
                let access = match v.space {
                    naga::AddressSpace::Uniform => Access::Uniform,
                    naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => Access::ReadWrite,
                    naga::AddressSpace::Storage { .. } => Access::Read,
                    other => panic!("{}: binding in {other:?}", shader.entry_point),
                };
                Some((binding.binding, v.name.clone().unwrap_or_default(), access))
            })
            .collect();
        found.sort_by_key(|(index, ..)| *index);
        let described: Vec<(u32, String, Access)> =
            shader.bindings.iter().enumerate().map(|(i, b)| (i as u32, b.name.to_string(), b.access)).collect();
        assert_eq!(found, described, "{}", shader.entry_point);
    }
}

#[test]
fn a_broken_source_is_refused() {
    let shader = &WGSL[0];
    assert!(naga::front::wgsl::parse_str(&shader.source.replace("f32(q)", "f33(q)")).is_err());
}
