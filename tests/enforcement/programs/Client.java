// The program of client.c in Java. Eight more threads load from the mapping all the time; a fault ends
// the virtual machine, which writes its address to the file that -XX:ErrorFile names.
import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;

public class Client {
    static volatile MappedByteBuffer memory;
    static volatile int loaded;

    static String next() throws IOException {
        StringBuilder line = new StringBuilder();
        for (int c; (c = System.in.read()) != '\n'; line.append((char) c)) {
            if (c < 0) Runtime.getRuntime().halt(0);
        }
        return line.toString();
    }

    static String answer(String[] w) throws IOException {
        switch (w[0]) {
            case "map": {
                boolean writes = (Integer.parseInt(w[5]) & 2) != 0;
                try (RandomAccessFile file = new RandomAccessFile(w[1], w[2].equals("rw") ? "rw" : "r")) {
                    MappedByteBuffer made = file.getChannel().map(
                            writes ? FileChannel.MapMode.READ_WRITE : FileChannel.MapMode.READ_ONLY,
                            Long.parseLong(w[3]), Long.parseLong(w[4]));
                    memory = made;
                    return "mapped";
                } catch (IOException e) {
                    return "refused " + e.getMessage().replace('\n', ' ');
                }
            }
            case "load":
                return "value " + (memory.get(Integer.parseInt(w[1])) & 0xff);
            case "store":
                memory.put(Integer.parseInt(w[1]), (byte) Integer.parseInt(w[2]));
                return "stored 0";
            case "in":
            case "out": {
                int at = Integer.parseInt(w[1]);
                ByteBuffer part = memory.duplicate().position(at).limit(at + 1);
                boolean in = w[0].equals("in");
                try (FileChannel file = FileChannel.open(Path.of(w[2]),
                        in ? StandardOpenOption.READ : StandardOpenOption.WRITE)) {
                    return "count " + (in ? file.read(part) : file.write(part));
                } catch (IOException e) {
                    return e.getMessage().equals("Bad address") ? "errno 14" : "failed " + e;
                }
            }
            case "threads": // load the byte at OFFSET from now on
                int at = Integer.parseInt(w[1]);
                for (int i = 0; i < 8; i++) {
                    Thread thread = new Thread(() -> {
                        for (long n = 0; ; n++) {
                            loaded = memory.get(at);
                            if (n % 1000 == 0) Thread.yield();
                        }
                    });
                    thread.setDaemon(true);
                    thread.start();
                }
                return "result 0";
            default:
                return "what 0";
        }
    }

    public static void main(String[] arguments) throws IOException {
        System.out.println("ready " + ProcessHandle.current().pid());
        while (true) {
            System.out.println(answer(next().split(" ")));
        }
    }
}
