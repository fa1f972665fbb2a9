//! Exports over devices: filled slots, the targets' own checks, round trips, refusals.

use tierwise_planner::balance::result::{BALANCE_VERSION, BalanceFile, FileDevice};
use tierwise_planner::export::Content;
use tierwise_planner::export::ep::{
    check_sglang, check_tensorrt_llm, check_vllm_ascend, import as import_devices, sglang, tensorrt_llm, vllm_ascend,
};
use tierwise_planner::export::import;
use tierwise_planner::export::kt_kernel::gpu_mask;
use tierwise_planner::export::kt_yaml::{is_on_gpu, parse_rules};
use tierwise_planner::export::llama_cpp::{buffer_of, parse_overrides};
use tierwise_planner::export::mistralrs::parse_topology;

/// Six experts on two devices with four slots each, one of which is free; layer 0 of 3 is dense.
fn placement() -> BalanceFile {
    BalanceFile {
        tierwise_balance: BALANCE_VERSION,
        model: "a model".into(),
        num_layers: 3,
        moe_layers: vec![1, 2],
        num_experts: 6,
        num_groups: 1,
        policy: "tierwise".into(),
        devices: vec![FileDevice { node: 0, speed: 1.0, slots: 4 }; 2],
        slots: vec![vec![vec![0, 1, 2, 3], vec![0, 4, 5]], vec![vec![5, 1, 2, 0], vec![0, 3, 4, 5]]],
        load: vec![vec![0.5, 0.1, 0.1, 0.1, 0.1, 0.1]; 2],
        packs: Vec::new(),
        pack_of: Vec::new(),
    }
}

fn text(content: Option<Content>) -> String {
    match content {
        Some(Content::Text(text)) => text,
        other => panic!("no text: {other:?}"),
    }
}

#[test]
fn placements_come_back_from_every_format() {
    let file = placement();
    for (exported, dense) in [(sglang(&file), 1), (tensorrt_llm(&file), 0), (vllm_ascend(&file), 0)] {
        let exported = exported.expect("a valid placement");
        let back = import_devices(&text(exported.content.clone()), 2).expect(exported.target);
        let moe = back.slots.len() - dense;
        assert_eq!(moe, 2, "{}", exported.target);
        for (layer, slots) in back.slots.iter().skip(dense).enumerate() {
            for (held, planned) in slots.iter().zip(&file.slots[layer]) {
                assert_eq!(held.len(), 4, "every slot is filled");
                assert!(planned.iter().all(|e| held.contains(e)), "{}: {held:?} has not {planned:?}", exported.target);
            }
        }
        let loss = &exported.loss;
        assert!(loss.notes.iter().any(|n| n.contains("1 free slots were filled")), "{loss:?}");
        let (planned, after) = (loss.balancedness_planned.expect("stated"), loss.balancedness_exported.expect("stated"));
        assert!(planned >= after - 1e-9 && after > 0.5, "{planned} and {after}");
        assert!(exported.command.contains("{model}") && exported.command.contains("{file}"));
    }
    // The free slot's best filling: by hand, device 0 has 0.25 + 0.3, device 1 0.25 + 0.2; half of one of the 0.1 evens it out.
    let filled = text(sglang(&file).expect("valid").content);
    let rows = check_sglang(&filled, 3, 6, 2, 8).expect("its own check");
    assert_eq!(rows[0], [0, 1, 2, 3, 4, 5, 0, 1], "the dense layer's row is the trivial one");
    assert!([1, 2, 3].contains(&rows[1][7]), "{:?}", rows[1]);
    assert!(sglang(&file).expect("valid").command.contains("--ep-num-redundant-experts 2"));
}

#[test]
fn what_targets_refuse_is_refused_here() {
    let sglang_table = [
        (r#"{"physical_to_logical_map":[[0,1]],"x":1}"#, "physical_to_logical_map and no other"),
        (r#"{"logical_count":[[0,1]]}"#, "physical_to_logical_map and no other"),
        (r#"{"physical_to_logical_map":[[0,1],[0,1]]}"#, "the number of rows is 2, expected 1, all hidden layers"),
        (r#"{"physical_to_logical_map":[[0,1,1]]}"#, "slots of layer 0 is 3"),
        (r#"{"physical_to_logical_map":[[0,2]]}"#, "an expert of layer 0 is 2, expected below 2"),
        (r#"{"physical_to_logical_map":[[0,0]]}"#, "slots of expert 1 in layer 0 is 0"),
        (r#"{"physical_to_logical_map":[[-1,0]]}"#, "rows of expert ids"),
        ("[1]", "a JSON object"),
    ];
    for (text, message) in sglang_table {
        let error = check_sglang(text, 1, 2, 1, 2).expect_err(text).to_string();
        assert!(error.contains(message), "{error}");
    }
    let error = check_sglang(r#"{"physical_to_logical_map":[[0,1]]}"#, 1, 2, 4, 2).expect_err("indivisible").to_string();
    assert!(error.contains("a multiple of --ep-size, 4"), "{error}");
    let trt_table = [
        ("num_slots: 4\nextra: 1\n", "a key is extra: 1"),
        ("initial_global_assignments:\n  3: [0, 1]\n", "num_slots is absent"),
        ("num_slots: 1\n", "num_slots is 1, expected 2 or more"),
        ("num_slots: 3\n", "num_slots is 3, expected 2 or more, a multiple of 2"),
        ("num_slots: 2\ninitial_global_assignments:\n  3: [0]\n", "slots of layer 3 is 1, expected 2"),
        ("num_slots: 2\ninitial_global_assignments:\n  3: [0, 5]\n", "an expert of layer 3 is 5"),
        ("num_slots: 2\ninitial_global_assignments:\n  3: 0, 1\n", "an assignment"),
    ];
    for (text, message) in trt_table {
        let error = check_tensorrt_llm(text, 2, 2).expect_err(text).to_string();
        assert!(error.contains(message), "{error}");
    }
    let layer = |devices: &str| {
        format!(r#"{{"moe_layer_count":1,"layer_list":[{{"layer_id":0,"device_count":2,"device_list":[{devices}]}}]}}"#)
    };
    let ascend_table = [
        (layer(r#"{"device_id":0,"device_expert":[0]}"#), "devices of layer 0 is 1, expected 2"),
        (layer(r#"{"device_id":0,"device_expert":[0,0]},{"device_id":1,"device_expert":[1,0]}"#), "device 0 is one twice"),
        (layer(r#"{"device_id":0,"device_expert":[0]},{"device_id":1,"device_expert":[1,0]}"#), "as many as everywhere"),
        (r#"{"moe_layer_count":2,"layer_list":[]}"#.to_string(), "moe_layer_count is 2"),
    ];
    for (text, message) in ascend_table {
        let error = check_vllm_ascend(&text, 2, 2).expect_err(&text).to_string();
        assert!(error.contains(message), "{error}");
    }
    assert!(import_devices("nothing of it", 2).expect_err("unknown").to_string().contains("expected a file of"));
}

#[test]
fn placements_that_targets_cannot_hold_are_refused() {
    let mut uneven = placement();
    uneven.devices[1].slots = 3;
    uneven.slots[1][1] = vec![3, 4, 5];
    let error = sglang(&uneven).expect_err("uneven").to_string();
    assert!(error.contains("slots of device 1 is 3, expected 4"), "{error}");
    // More slots than experts: SGLang takes a second copy, vLLM-Ascend's map cannot.
    let mut wide = placement();
    wide.devices.iter_mut().for_each(|d| d.slots = 7);
    assert!(sglang(&wide).expect("repeats").loss.notes.iter().any(|n| n.contains("more slots than experts")));
    assert!(vllm_ascend(&wide).expect_err("repeats").to_string().contains("at most 6"));
    #[rustfmt::skip]
    #[expect(clippy::type_complexity, reason = "rows of a table")]
    let table: [(&str, fn(&mut BalanceFile), &str); 7] = [
        ("expert nowhere", |f| f.slots[0][0] = vec![0, 1, 2, 2], "layer 1: the devices that hold expert 3 is none"),
        ("unknown expert", |f| f.slots[0][0] = vec![0, 1, 2, 9], "layer 1: an expert on device 0 is 9"),
        ("too many", |f| f.slots[0][0] = vec![0, 1, 2, 3, 4], "layer 1: the number of slots of device 0 is 5"),
        ("layers", |f| f.moe_layers = vec![2, 1], "moe_layers is [2, 1]"),
        ("layer beyond", |f| f.num_layers = 2, "moe_layers is [1, 2], expected ascending layers below 2"),
        ("NaN", |f| f.load[1][2] = f64::NAN, "expert 2 in layer 1 is NaN"),
        ("speed", |f| f.devices[1].speed = 0.0, "speed of device 1 is 0"),
    ];
    for (what, spoil, message) in table {
        let mut file = placement();
        spoil(&mut file);
        let error = file.check().expect_err(what).to_string();
        assert!(error.contains(message), "{what}: {error}");
    }
    let good = placement();
    assert_eq!(BalanceFile::from_json(&good.to_json()).expect("round trip"), good);
    for text in ["{}", "[", r#"{"tierwise_balance":2}"#] {
        assert!(BalanceFile::from_json(text).is_err());
    }
}

#[test]
fn llama_cpps_arguments_are_read_as_it_reads_them() {
    let overrides =
        parse_overrides([r"blk\.(3|4)\.ffn_(up|gate|down)_exps=CUDA0", r"\.ffn_(up|down|gate)_exps=CPU,output=CUDA1"]);
    let overrides = overrides.expect("valid");
    for (tensor, buffer) in [
        ("blk.3.ffn_up_exps.weight", Some("CUDA0")),
        ("blk.13.ffn_up_exps.weight", Some("CPU")),
        ("blk.13.attn_q.weight", None),
        ("output.weight", Some("CUDA1")),
    ] {
        assert_eq!(buffer_of(&overrides, tensor), buffer, "{tensor}");
    }
    for wrong in ["blk\\.{1,2}=CPU", "no buffer", "x=GPU9", "(=CPU"] {
        assert!(parse_overrides([wrong]).is_err(), "{wrong}");
    }
}

#[test]
fn small_rules_of_targets() {
    assert_eq!(gpu_mask(&[0, 9, 0, 9, 5], 3), [false, true, false, true, true]);
    let devices = parse_topology("0-4:\n  device: cuda[0]\n2-3:\n  device: cpu\n", 6).expect("valid");
    // Sorted by end: 2-3 comes first and is overridden.
    assert_eq!(devices, [vec![Some("cuda[0]".to_string()); 4], vec![None; 2]].concat());
    for wrong in ["4-2:\n  device: cpu\n", "0-9:\n  device: cpu\n", "0-2:\n  device: gpu\n", "0-2:\n", "x\n"] {
        assert!(parse_topology(wrong, 6).is_err(), "{wrong}");
    }
}

#[test]
fn other_engines_settings_come_back_as_placements() {
    let layers = [(1_u32, 4_usize), (2, 4), (3, 4)];
    let on = |w: &import::Wanted| w.on_gpu.iter().map(|row| row.iter().all(|g| *g)).collect::<Vec<_>>();
    // The first override that matches wins; quotes as in a shell.
    let line = r#"llama-server -m "a model.gguf" -ngl 99 -ot "blk\.(1|2)\.ffn_(up|down|gate)_exps=CUDA0,exps=CPU" -c 8192 -np 2 -ub 256"#;
    let found = import::llama_cpp(line, &layers, 4).expect("a command line");
    assert_eq!(on(&found), [true, true, false]);
    assert_eq!((found.context, found.parallel, found.chunk), (Some(8192), Some(2), Some(256)));
    // The first N layers of all; dense ones count.
    assert_eq!(on(&import::llama_cpp("llama-cli --n-cpu-moe 2", &layers, 4).expect("good")), [false, true, true]);
    assert_eq!(on(&import::llama_cpp("llama-cli -cmoe", &layers, 4).expect("good")), [false, false, false]);
    // The output is the last layer: -ngl 3 of 4 layers and the output leaves 0 and 1 on the CPU.
    let few = import::llama_cpp("llama-cli -ngl 3", &layers, 4).expect("good");
    assert_eq!(on(&few), [false, true, true]);
    assert!(few.notes.iter().any(|n| n.contains("attention of layers below 2")), "{few:?}");
    // One matrix on the CPU: not computed on the GPU as a whole.
    let partial = import::llama_cpp(r"x -ot blk\.2\.ffn_down_exps=CPU", &layers, 4).expect("good");
    assert_eq!(on(&partial), [true, false, true]);
    assert!(partial.notes.iter().any(|n| n.contains("some of its matrices")));
    for (bad, words) in
        [("-ot exps", "REGEX=BUFFER"), ("-ngl many", "a number"), ("-ot 'exps=CPU", "quote"), ("-ot exps=GPU7", "CUDA0")]
    {
        let error = import::llama_cpp(bad, &layers, 4).expect_err(words).to_string();
        assert!(error.contains(words), "{bad}: {error}");
    }
    let topology = import::topology("2-3:\n  device: cpu\n", &layers, 4).expect("a topology");
    assert_eq!(on(&topology), [true, false, true]);
}

#[test]
fn ktransformers_rules_are_read_as_it_reads_them() {
    let text = r#"
- match:
    class: ktransformers.models.modeling_deepseek.DeepseekV2YarnRotaryEmbedding
  replace:
    class: ktransformers.operators.RoPE.YarnRotaryEmbedding
    kwargs:
      generate_device: "cuda"
- match: {name: "^model\\.layers\\.([0-1])\\.mlp\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {prefill_device: "cuda:0", generate_device: "cuda:0", generate_op: "KExpertsMarlin", out_device: "cuda:0"}
  recursive: False
- match:
    name: "^model\\.layers\\..*\\.mlp\\.experts$"  # the rest
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cpu"
      generate_op: "KExpertsCPU"
      out_device: "cuda:0"
"#;
    let rules = parse_rules(text).expect("good rules");
    assert_eq!(rules.len(), 2);
    assert_eq!([0, 1, 2, 10].map(|l| is_on_gpu(&rules, l)), [Some(true), Some(true), Some(false), Some(false)]);
    assert_eq!(is_on_gpu(&rules[..1], 5), None);
    let wanted = import::kt_rules(text, &[(1, 2), (2, 2)]).expect("good rules");
    assert_eq!(wanted.on_gpu, [[true, true], [false, false]]);
    for (from, to, words) in [
        ("\"KExpertsMarlin\"", "\"KExpertsCPU\"", "KExpertsCPU on cuda:0"),
        ("KExpertsMarlin", "KExpertsMagic", "KExpertsMagic"),
        ("([0-1])", "([0-1]", "an expression"),
        ("- match: {name", "- smatch: {name", "match and replace"),
    ] {
        let error = parse_rules(&text.replacen(from, to, 1)).expect_err(words).to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}
