// Greedy decoding of many sequences in llama.cpp, behind C functions that take plain numbers: whoever calls them need
// know no struct of llama.cpp's. What cannot be done is said on standard error by llama.cpp; here it is a null or a
// status that is not 0.

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "llama.h"

namespace {

struct Decoder {
  llama_model* model;
  llama_context* context;
  llama_batch batch;
  int32_t vocab_size;
};

void only_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

extern "C" {

// Every sequence has room for context_len tokens; a call of `decode` takes at most max_batch_tokens.
// KV is float32 like everybody else's where the weights are, not llama.cpp's own choice of float16.
Decoder* open_decoder(const char* model_file, int32_t max_sequences, int32_t context_len, int32_t max_batch_tokens,
                      int32_t threads, bool float32_kv) {
  llama_log_set(only_errors, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(model_file, llama_model_default_params());
  if (model == nullptr) return nullptr;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(max_sequences * context_len);
  params.n_seq_max = static_cast<uint32_t>(max_sequences);
  params.n_batch = params.n_ubatch = static_cast<uint32_t>(max_batch_tokens);
  params.n_threads = params.n_threads_batch = threads;
  params.type_k = params.type_v = float32_kv ? GGML_TYPE_F32 : GGML_TYPE_F16;
  params.no_perf = true;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) return nullptr;
  const int32_t vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(model));
  return new Decoder{model, context, llama_batch_init(max_batch_tokens, 0, 1), vocab_size};
}

llama_adapter_lora* load_adapter(Decoder* decoder, const char* file) {
  return llama_adapter_lora_init(decoder->model, file);
}

// What all sequences run with from now on: the sum of these adapters, each times its scale; none where count is 0.
int32_t use_adapters(Decoder* decoder, llama_adapter_lora** adapters, float* scales, int32_t count) {
  return llama_set_adapters_lora(decoder->context, adapters, static_cast<size_t>(count), scales);
}

void forget_sequence(Decoder* decoder, int32_t sequence) {
  llama_memory_seq_rm(llama_get_memory(decoder->context), sequence, -1, -1);
}

// One forward pass of count tokens; best[i] is the likeliest token after the i-th of those that are wanted.
int32_t decode(Decoder* decoder, const int32_t* tokens, const int32_t* positions, const int32_t* sequences,
               const int8_t* wanted, int32_t count, int32_t* best) {
  llama_batch& batch = decoder->batch;
  batch.n_tokens = count;
  for (int32_t i = 0; i < count; i++) {
    batch.token[i] = tokens[i];
    batch.pos[i] = positions[i];
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequences[i];
    batch.logits[i] = wanted[i];
  }
  const int32_t status = llama_decode(decoder->context, batch);
  if (status != 0) return status;
  for (int32_t i = 0; i < count; i++) {
    if (!wanted[i]) continue;
    const float* logits = llama_get_logits_ith(decoder->context, i);
    *best++ = static_cast<int32_t>(std::max_element(logits, logits + decoder->vocab_size) - logits);
  }
  return 0;
}

}  // extern "C"
