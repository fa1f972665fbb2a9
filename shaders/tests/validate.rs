//! Every WGSL variant is valid with the least capabilities it may need, and is what its description says.

use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use tierwise_shaders::wgsl::{Access, ENTRY_POINT, Kernel, Rows, Shader};

/// Reading f16 scales with `unpack2x16float` needs this one; no f16 arithmetic.
const LEAST: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

fn parse(kernel: Kernel, shader: &Shader) -> naga::Module {
    naga::front::wgsl::parse_str(&shader.source).unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&shader.source)))
}

fn validate(kernel: Kernel, shader: &Shader, module: &naga::Module) -> ModuleInfo {
    let capabilities = if shader.subgroups { LEAST | Capabilities::SUBGROUP } else { LEAST };
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    if shader.subgroups {
        validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
    }
    validator.validate(module).unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&shader.source)))
}

/// Every variant, with subgroup operations and without.
fn variants() -> impl Iterator<Item = (Kernel, Shader)> {
    let with = |subgroups: bool| move |k: Kernel| (!subgroups || k.has_subgroup_variant()).then(|| (k, k.shader(subgroups)));
    Kernel::all().into_iter().flat_map(move |k| [false, true].into_iter().filter_map(move |s| with(s)(k)))
}

#[test]
fn every_variant_is_valid_and_as_described() {
    let mut count = 0;
    for (kernel, shader) in variants() {
        let module = parse(kernel, &shader);
        let info = validate(kernel, &shader, &module);
        let options = naga::back::spv::Options { lang_version: (1, 3), ..naga::back::spv::Options::default() };
        let words = naga::back::spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| panic!("{kernel:?}: {e}"));
        assert!(words.len() > 100, "{kernel:?}");
        matches_its_description(kernel, &shader, &module);
        needs_no_more_than_the_least_device_has(kernel, &shader, &module);
        count += 1;
    }
    assert!(count > 1000, "{count} variants");
}

fn matches_its_description(kernel: Kernel, shader: &Shader, module: &naga::Module) {
    let entry = module.entry_points.iter().find(|e| e.name == ENTRY_POINT).expect("the entry point exists");
    assert_eq!(entry.workgroup_size, [shader.lanes, 1, 1], "{kernel:?}");
    let mut bindings = 0;
    for (_, variable) in module.global_variables.iter() {
        let Some(binding) = &variable.binding else { continue };
        bindings += 1;
        match (binding.binding, &module.types[variable.ty].inner) {
            (0, naga::TypeInner::Struct { members, .. }) => {
                assert_eq!(members.len(), shader.params.len(), "{kernel:?}");
                for (i, (member, param)) in members.iter().zip(shader.params).enumerate() {
                    assert_eq!((member.offset, member.name.as_deref()), (4 * i as u32, Some(param.name)), "{kernel:?}");
                }
            }
            (index, _) => {
                let described = shader.bindings[index as usize - 1];
                let naga::AddressSpace::Storage { access } = variable.space else { panic!("{kernel:?}: {:?}", variable.space) };
                let written = access.contains(naga::StorageAccess::STORE);
                assert_eq!((variable.name.as_deref(), written), (Some(described.name), described.access == Access::ReadWrite));
            }
        }
    }
    assert_eq!(bindings, shader.bindings.len() + 1, "{kernel:?}");
}

/// Devices may offer no more than the defaults of WebGPU.
fn needs_no_more_than_the_least_device_has(kernel: Kernel, shader: &Shader, module: &naga::Module) {
    let workgroup = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    let bytes: u32 = workgroup.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum();
    assert!(bytes <= 16384, "{kernel:?}: {bytes} bytes of workgroup memory");
    assert!(shader.bindings.len() <= 8, "{kernel:?}: {} storage bindings", shader.bindings.len());
    assert!(shader.lanes <= 256 && shader.params.len() <= 16, "{kernel:?}");
}

#[test]
fn a_broken_source_is_refused() {
    let source = Kernel::MatMul(tierwise_cost::quant::QuantFormat::Q8_0, Rows::One).shader(false).source;
    assert!(naga::front::wgsl::parse_str(&source.replace("dot(w0, v)", "dot(w9, v)")).is_err());
}
