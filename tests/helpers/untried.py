"""Generative classes of transformers that `test_causality.py` does not try, by the reason."""

UNTRIED: dict[str, str] = {
    "a call without images fails in transformers 5.24": """
        Llama4ForConditionalGeneration
    """,
    "the fields that make it large say so by no name: over 5 million parameters": """
        BarkModel
        BltForCausalLM
        CsmForConditionalGeneration
        DeepseekVLHybridForConditionalGeneration
        Florence2ForConditionalGeneration
        JanusForConditionalGeneration
        MuseSparkForConditionalGeneration
        MusicgenForConditionalGeneration
        MusicgenMelodyForConditionalGeneration
        NemotronH_Omni_Reasoning_V3
        PPFormulaNetForConditionalGeneration
        Qwen2_5OmniForConditionalGeneration
        SeamlessM4TForTextToSpeech
        SeamlessM4TModel
        SeamlessM4Tv2ForTextToSpeech
        SeamlessM4Tv2Model
        UnlimitedOcrForConditionalGeneration
        VibeVoiceAsrForConditionalGeneration
        VibeVoiceForConditionalGeneration
    """,
    "it needs inputs or sizes that the names of its fields do not tell": """
        Blip2ForConditionalGeneration
        ClvpModelForConditionalGeneration
        Ernie4_5_VLMoeForConditionalGeneration
        InstructBlipForConditionalGeneration
        InstructBlipVideoForConditionalGeneration
        Kosmos2ForConditionalGeneration
        Mistral4ForCausalLM
        MoonshineForConditionalGeneration
        Nemotron3_5AsrForRNNT
        NemotronAsrStreamingForRNNT
        ParakeetForRNNT
        ParakeetForTDT
        Pix2StructForConditionalGeneration
        SpeechT5ForTextToSpeech
        VoxtralRealtimeForConditionalGeneration
        Zamba2ForCausalLM
    """,
    "it returns no logits": """
        BlipForQuestionAnswering
    """,
    "its default configuration, made small, builds no model": """
        ChameleonForConditionalGeneration
        CohereCompassForCausalLM
        CohereCompassForConditionalGeneration
        DbrxForCausalLM
        DeepseekOcr2ForConditionalGeneration
        DiffusionGemmaForBlockDiffusion
        Dots1ForCausalLM
        Dots3NoteForCausalLM
        Dots3NoteForConditionalGeneration
        Emu3ForConditionalGeneration
        Gemma3nForCausalLM
        Gemma4AssistantForCausalLM
        Gemma4UnifiedAssistantForCausalLM
        Granite4VisionForConditionalGeneration
        KyutaiSpeechToTextForConditionalGeneration
        Lfm2MoeForCausalLM
        MoonshineStreamingForConditionalGeneration
        NemotronForCausalLM
        Qwen3OmniMoeForConditionalGeneration
        Qwen4ExpForCausalLM
        Qwen4ExpForConditionalGeneration
        ZambaForCausalLM
    """,
    "refused: it passes activations as [tokens, batch, features]": """
        FSMTForConditionalGeneration
        XLNetLMHeadModel
    """,
    "timm is not installed": """
        FastVlmForConditionalGeneration
        Gemma3nForConditionalGeneration
        PerceptionLMForConditionalGeneration
    """,
    "refused: it runs streams of predictions beside the tokens": """
        ProphetNetForCausalLM
    """,
    "the pattern that PEFT makes of all-linear takes whole layers for linear ones": """
        Qwen3OmniMoeThinkerForConditionalGeneration
    """,
    "its logits see later tokens by themselves": """
        CpmAntForCausalLM
    """,
}
