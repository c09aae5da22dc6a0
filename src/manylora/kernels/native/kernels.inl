// All kernels for the instruction set MANYLORA_ISA. Each kernels_*.cpp includes this once, compiled for its own set.
#include "attention.inl"
#include "rowwise.inl"
#include "int8.inl"
#include "lora.inl"
#include "place.inl"
#include "tiles.inl"

#define MANYLORA_TEXT(name) MANYLORA_TEXT_OF(name)
#define MANYLORA_TEXT_OF(name) #name

namespace manylora {

const Kernels MANYLORA_TABLE = {
    MANYLORA_TEXT(MANYLORA_ISA), MANYLORA_ISA::shrink,   MANYLORA_ISA::expand,       MANYLORA_ISA::lora,
    MANYLORA_ISA::attend,        MANYLORA_ISA::rotate,   MANYLORA_ISA::write_kv,     MANYLORA_ISA::add_rms_norm,
    MANYLORA_ISA::argmax,        MANYLORA_ISA::silu_mul, MANYLORA_ISA::place_rows,
    MANYLORA_ISA::round_rows,    MANYLORA_ISA::int8_product, MANYLORA_ISA::tile_product,
};

}  // namespace manylora
