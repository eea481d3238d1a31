// One call of the compiled CPU attention on another processor: inputs from a file, results to a file (test_cpu_native.py).
//
//     native_driver IN OUT
//
// IN: 8 int64 counts and a double (the head of `Arguments`), 4 for float32, 8 for float64, 2 for bfloat16, then for each pointer of `Arguments` in its order, up to
// `dslopes`, the number of bytes and the bytes; 0 bytes: a null pointer. OUT: the bytes of `out`, `lse` and the gradients, likewise.
#include <cstdio>
#include <cstdlib>

#include "attention.cpp"

namespace {

void read(void* to, size_t size, FILE* file) {
    if (size && std::fread(to, 1, size, file) != size) std::exit(3);
}

template <class S> int run(Arguments& x) {
    if (forward<S>(x)) return 1;
    std::vector<Sum<S>> key_gradients(num_gradients<Sum<S>>(x));
    x.key_gradients = key_gradients.data();
    return backward<S>(x);
}

int run(Arguments& x, int64_t size_of_number) {
#ifdef DTI_BFLOAT16
    if (size_of_number == 2) return run<bfloat16>(x);
#endif
    return size_of_number == 8 ? run<double>(x) : size_of_number == 4 ? run<float>(x) : 4;
}

}  // namespace

int main(int, char** names) {
    FILE* in = std::fopen(names[1], "rb");
    if (!in) return 2;
    Arguments x{};
    int64_t size_of_number = 0;
    read(&x, 8 * sizeof(int64_t) + sizeof(double), in);
    read(&size_of_number, sizeof size_of_number, in);
    constexpr int POINTERS = 19;
    std::vector<std::vector<char>> memory(POINTERS);
    void** pointers = const_cast<void**>(&x.q);
    for (int i = 0; i < POINTERS; i++) {
        int64_t size = 0;
        read(&size, sizeof size, in);
        memory[i].resize(size);
        read(memory[i].data(), size, in);
        pointers[i] = size ? memory[i].data() : nullptr;
    }
    std::fclose(in);
    const int status = run(x, size_of_number);
    if (status) return status;
    FILE* out = std::fopen(names[2], "wb");
    if (!out) return 2;
    for (const std::vector<char>& bytes : memory) std::fwrite(bytes.data(), 1, bytes.size(), out);
    return std::fclose(out) ? 2 : 0;
}
