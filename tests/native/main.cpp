// Runs the native kernels of every instruction set that this processor has, without Python, on memory of exact size:
// built with AddressSanitizer and UndefinedBehaviorSanitizer, a stray read or write ends it (but for loads of tiles, which
// they do not see). What is right is computed in double, in plain loops.
//
//     manylora_native_tests [ROUNDS [SEED]]
//     manylora_native_tests without KERNEL      the kernel does nothing: failures must be found
//     manylora_native_tests stray               reads beyond a block: the sanitizer must end it

#include <string>

#include "check.hpp"
#include "isas.hpp"

namespace {

// The table with a kernel that leaves its output as it is.
manylora::Kernels without(const manylora::Kernels& kernels, const std::string& name) {
  manylora::Kernels broken = kernels;
  if (name == "shrink") broken.shrink = [](auto...) {};
  else if (name == "expand") broken.expand = [](auto...) {};
  else if (name == "lora") broken.lora = [](auto...) {};
  else if (name == "attend") broken.attend = [](auto...) {};
  else if (name == "rotate") broken.rotate = [](auto...) {};
  else if (name == "write_kv") broken.write_kv = [](auto...) {};
  else if (name == "add_rms_norm") broken.add_rms_norm = [](auto...) {};
  else if (name == "argmax") broken.argmax = [](auto...) {};
  else if (name == "silu_mul") broken.silu_mul = [](auto...) {};
  else if (name == "place_rows") broken.place_rows = [](auto...) {};
  else if (name == "round_rows") broken.round_rows = [](auto...) {};
  else if (name == "int8_product") broken.int8_product = [](auto...) {};
  else if (name == "tile_product") broken.tile_product = [](auto...) {};
  else std::printf("no kernel %s\n", name.c_str()), std::exit(2);
  return broken;
}

void run(const manylora::Kernels& kernels, int rounds, uint32_t seed) {
  manylora::test::Random random(seed);  // the same cases for each instruction set
  for (int round = 0; round < rounds; round++) {
    manylora::test::test_lora(kernels, random);
    manylora::test::test_lora_at_once(kernels, random);
    manylora::test::test_attention(kernels, random);
    manylora::test::test_rows(kernels, random);
    manylora::test::test_int8(kernels, random);
    manylora::test::test_tiles(kernels, random);
    manylora::test::test_decoder(kernels, random);
    manylora::test::test_place(kernels, random);
    manylora::test::test_round(kernels, random);
  }
  std::printf("%s: %d rounds\n", kernels.isa, rounds);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string first = count > 1 ? arguments[1] : "40";
  if (first == "stray") {
    const manylora::test::Block<float> block(3);
    std::printf("read %g\n", block[count + 1]);  // count is 2: one beyond the last
  } else if (first == "without" && count > 2) {
    for (const manylora::Kernels* kernels : manylora::supported()) run(without(*kernels, arguments[2]), 5, 1);
  } else {
    const uint32_t seed = count > 2 ? static_cast<uint32_t>(std::atoi(arguments[2])) : 1;
    for (const manylora::Kernels* kernels : manylora::supported()) run(*kernels, std::atoi(first.c_str()), seed);
  }
  std::printf("%ld failures\n", static_cast<long>(manylora::test::failures));
  return manylora::test::failures == 0 ? 0 : 1;
}
